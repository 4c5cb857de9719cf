"""`examples/serve.py` under load: requests with several adapters while adapters are added, replaced and removed."""

from __future__ import annotations

import asyncio
import importlib
import itertools
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import lora_lite_fx as llfx
from tests.support.conformance import randomise
from tests.support.models import tiny_llama

for package in ("fastapi", "uvicorn"):
    pytest.importorskip(package)
httpx: Any = pytest.importorskip("httpx")
serve: Any = importlib.import_module("serve")  # of examples/

STATES = 3
TOKENS = 6
PROMPTS = ["w5 w6 w7", "w8", "w9 w5 w11 w12 w13", "w7 w7"]


def tokenizer() -> Any:
    words = Tokenizer(models.WordLevel({f"w{index}": index for index in range(99)}, unk_token="w3"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return hf.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", eos_token="w2", unk_token="w3")


@pytest.fixture(scope="module")
def base() -> Any:
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(tiny_llama()).eval()


@pytest.fixture(scope="module")
def adapters(base: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], dict[Any, str]]:
    """Several adapters, of two ranks and in two forms of files; and the answer of each, alone, to each prompt."""
    files = [tmp_path_factory.mktemp("adapters") / str(state) for state in range(STATES)]
    answers: dict[Any, str] = {(prompt, None): answer(base, prompt) for prompt in PROMPTS}
    for state, file in enumerate(files):
        model = llfx.adapt(base, llfx.LoRA(r=2 + state % 2, target_roles=("attention",)))
        randomise(model, state)
        (llfx.save_peft if state == 1 else llfx.save)(model, file)
        answers |= {(prompt, state): answer(model, prompt) for prompt in PROMPTS}
    for prompt in PROMPTS:
        assert len({answers[prompt, state] for state in (None, *range(STATES))}) == STATES + 1, "they tell nothing"
    return files, answers


def answer(model: Any, prompt: str) -> str:
    words = tokenizer()
    ids = words(prompt, return_tensors="pt").input_ids
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS, do_sample=False)
    text: str = words.decode(new[0, ids.shape[1] :], skip_special_tokens=True)
    return text


@pytest.fixture
def engine(base: Any) -> Iterator[Any]:
    engine = serve.Engine(base, tokenizer(), slots=3, rank=4, batch=4)
    yield engine
    engine.thread.shutdown()


@asynccontextmanager
async def client_of(engine: Any) -> AsyncIterator[Any]:
    transport = httpx.ASGITransport(serve.make_app(engine))
    async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=120) as client:
        yield client


async def ask(client: Any, prompt: str, adapter: str | None, stream: bool = False) -> Any:
    question = {"prompt": prompt, "adapter": adapter, "max_tokens": TOKENS, "stream": stream}
    return await client.post("/generate", json=question)


def streamed(response: Any) -> str:
    *parts, done = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    assert done == "[DONE]"
    return "".join(json.loads(part)["text"] for part in parts)


async def put(client: Any, name: str, path: Path) -> Any:
    return await client.put(f"/adapters/{name}", json={"path": str(path)})


def test_each_request_has_its_adapter_and_mistakes_are_told(engine: Any, adapters: Any, tmp_path: Path) -> None:
    files, expected = adapters

    async def run() -> None:
        async with client_of(engine) as client:
            assert (await put(client, "fr", files[0])).json() == ["fr"]
            assert (await put(client, "de", files[1])).json() == ["de", "fr"]
            asked = [(prompt, name) for prompt in PROMPTS for name in (None, "fr", "de")]
            answers = await asyncio.gather(*(ask(client, *each) for each in asked))
            for (prompt, name), answer in zip(asked, answers, strict=True):
                assert answer.json()["text"] == expected[prompt, {"fr": 0, "de": 1, None: None}[name]]
            in_parts = await ask(client, PROMPTS[0], "de", stream=True)
            assert streamed(in_parts) == expected[PROMPTS[0], 1]
            assert in_parts.text.count("data:") > 3

            unknown = await ask(client, PROMPTS[0], "it")
            assert (unknown.status_code, "no adapter 'it'" in unknown.text) == (404, True)
            assert (await put(client, "it", files[2])).status_code == 200
            full = await put(client, "es", files[2])
            assert (full.status_code, "Remove an adapter first" in full.text) == (409, True)
            assert (await client.delete("/adapters/it")).json() == ["de", "fr"]
            assert (await client.delete("/adapters/it")).status_code == 404
            (tmp_path / "bad").write_bytes(b"not a file of tensors")
            for path, message in ((tmp_path / "bad", "bad"), (tmp_path / "nothing", "There is no")):
                bad = await put(client, "it", path)
                assert (bad.status_code, message in bad.text) == (422, True)
            assert (await client.post("/generate", json={"prompt": "w5 " * 5000})).status_code == 422
            assert (await client.get("/adapters")).json() == ["de", "fr"]
            assert (await client.get("/health")).json() == {"unanswered": 0, "free_slots": 1}

    asyncio.run(run())


@pytest.mark.broad
@pytest.mark.parametrize(("clients", "turns"), [(4, 4), (12, 40)], ids=["some", "many"])
def test_nothing_is_lost_while_adapters_are_replaced_and_removed(
    engine: Any, adapters: Any, clients: int, turns: int
) -> None:
    files, expected = adapters

    async def asks(client: Any, number: int) -> None:
        for turn in itertools.count():
            if turn >= turns and counts.get("changes", 0) >= 2:
                return
            prompt = PROMPTS[(number + turn) % len(PROMPTS)]
            name = ("fr", None, "fr", "guest")[(number + 2 * turn + turn // 3) % 4]
            answer = await ask(client, prompt, name, stream=number % 3 == 2)
            if answer.status_code == 404:
                assert name == "guest"
                continue
            assert answer.status_code == 200, answer.text
            text = streamed(answer) if number % 3 == 2 else answer.json()["text"]
            possible = {"fr": range(STATES), None: [None], "guest": [2]}[name]
            assert text in [expected[prompt, state] for state in possible], (prompt, name)
            counts[name] = counts.get(name, 0) + 1

    async def changes(client: Any) -> None:
        state = 0
        while not done.is_set():
            state = (state + 1) % STATES
            replaced = await put(client, "fr", files[state])
            assert replaced.status_code in (200, 409), replaced.text
            assert (await put(client, "guest", files[2])).status_code in (200, 409)
            await asyncio.sleep(0.01)
            await client.delete("/adapters/guest")
            counts["changes"] = counts.get("changes", 0) + (replaced.status_code == 200)

    async def run() -> None:
        async with client_of(engine) as client:
            assert (await put(client, "fr", files[0])).status_code == 200
            changing = asyncio.create_task(changes(client))
            await asyncio.wait_for(asyncio.gather(*(asks(client, number) for number in range(clients))), 300)
            done.set()
            await changing
            for _ in range(100):  # the last batch may end after its last answer
                if not (await client.get("/health")).json()["unanswered"]:
                    return
                await asyncio.sleep(0.05)
            raise AssertionError("requests are lost")

    counts: dict[Any, int] = {}
    done = asyncio.Event()
    asyncio.run(run())
    assert counts["fr"] >= clients * turns // 3
