"""Adapt the UNet of a diffusion pipeline of diffusers to images of another kind, and let the pipeline draw.

    pip install -e ".[examples,clients]"
    python examples/diffusion.py                # a tiny pipeline, trained first: about a minute, 2 cores

No diffusion model is at hand offline, so a tiny one is trained first, on gray discs; that takes most of the time. Then
its frozen UNet is adapted to colored rings: LoRA at its attention and convolutions.

`adapt` returns a UNet of the same class, so the pipeline takes it and asks it for its `config`, `dtype` and `device`. A
graph is captured for each kind of call: the one that trains, and that of the pipeline, whose timestep is one number.

The script prints a progress bar for each training, and the loss on held-out images before and after. It writes
OUT/adapter/pytorch_lora_weights.safetensors, which `load_lora_weights` of diffusers reads too, and OUT/diffusion.png:
what the pipeline draws from the same noise without and with the adapters. Last it loads the file and draws again.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import diffusers
import matplotlib
import torch
from finetune_options import positive
from finetune_training import warmup_cosine
from matplotlib import pyplot
from torch import Tensor
from tqdm import tqdm

import lora_lite_fx as llfx

SIZE, BATCH, DRAWN = 16, 16, 8
CONFIG = llfx.LoRA(
    r=8,
    alpha=16.0,
    target_names=("to_q", "to_k", "to_v", "to_out", "conv1", "conv2", "conv_out"),
    target_kinds=("linear", "conv"),
)


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    base = unet()
    train(base, list(base.parameters()), discs, args.base_steps, 4e-3, "base")
    base.requires_grad_(False)
    model = llfx.adapt(base.eval(), CONFIG, example_inputs={"sample": discs(2), "timestep": torch.tensor([1, 2])})
    print(llfx.inspect(model))
    held, before = rings(64), draw_images(base)
    scores = [score(model, held)]
    train(model, llfx.adapter_parameters(model), rings, args.steps, 4e-3, "adapters")
    scores.append(score(model, held))
    print(f"held-out loss {scores[0]:.3f} before, {scores[1]:.3f} after")
    after = draw_images(model)
    picture({"base": before, "adapted": after}, args.out / "diffusion.png")

    llfx.save_diffusers(model, args.out / "adapter")
    again = llfx.adapt(
        base, args.out / "adapter", example_inputs={"sample": held[:2], "timestep": torch.tensor([1, 2])}
    )
    difference = (draw_images(again) - after).abs().max()
    print(f"reloaded from {args.out / 'adapter'}: images differ by {difference:.1e}")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--base-steps", type=positive, default=300, help="that train the base (default: %(default)s)")
    add("--steps", type=positive, default=150, help="that train the adapters (default: %(default)s)")
    add("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    return parser.parse_args()


def unet() -> Any:
    """Return a random UNet."""
    return diffusers.UNet2DModel(
        sample_size=SIZE,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=16,
    )


def discs(count: int) -> Tensor:
    """Draw gray discs `(count, 3, SIZE, SIZE)`, with values in [-1, 1]."""
    distance = distances(count)
    return torch.where(distance < 0.6, torch.rand(count, 1, 1, 1), -1.0).expand(-1, 3, -1, -1).contiguous()


def rings(count: int) -> Tensor:
    """Draw orange rings `(count, 3, SIZE, SIZE)`, with values in [-1, 1]."""
    distance = distances(count)
    color = torch.tensor([1.0, 0.2, -0.6]).view(1, 3, 1, 1)
    return torch.where((distance < 0.7) & (distance > 0.35), color, -1.0)


def distances(count: int) -> Tensor:
    """Return the distances of pixels from random places `(count, 1, SIZE, SIZE)`."""
    place = torch.linspace(-1, 1, SIZE)
    x, y = (0.5 * torch.rand(count, 1, 1, 1) - 0.25 for _ in range(2))
    return ((place.view(1, 1, 1, -1) - x) ** 2 + (place.view(1, 1, -1, 1) - y) ** 2).sqrt()


def loss_of(model: Any, images: Tensor) -> Tensor:
    """Return the mean squared error of the noise that the model sees in noisy images."""
    scheduler = diffusers.DDPMScheduler()
    noise, steps = torch.randn_like(images), torch.randint(scheduler.config.num_train_timesteps, (len(images),))
    return torch.nn.functional.mse_loss(model(scheduler.add_noise(images, noise, steps), steps).sample, noise)


def train(model: Any, parameters: list[Any], draw: Any, steps: int, rate: float, what: str) -> None:
    """Train parameters of a UNet on images that `draw` draws."""
    model.train()
    optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    with tqdm(range(steps), unit="step", desc=f"training the {what}") as bar:
        for _ in bar:
            loss = loss_of(model, draw(BATCH))
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            bar.set_postfix({"loss": f"{loss.item():.3f}"})


@torch.no_grad()
def score(model: Any, images: Tensor) -> float:
    """Return the loss on images, with the same noise each time."""
    model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return loss_of(model, images).item()


def draw_images(model: Any) -> Tensor:
    """Return images `(DRAWN, SIZE, SIZE, 3)` that the pipeline makes of the same noise, with values in [0, 1]."""
    pipeline = diffusers.DDIMPipeline(unet=model.eval(), scheduler=diffusers.DDIMScheduler(clip_sample=True))
    pipeline.set_progress_bar_config(desc="drawing", leave=False)
    generator = torch.Generator().manual_seed(0)
    return torch.from_numpy(pipeline(DRAWN, generator, num_inference_steps=20, output_type="np").images)


def picture(rows: dict[str, Tensor], path: Path) -> None:
    """Draw rows of images."""
    matplotlib.use("Agg")
    figure, axes = pyplot.subplots(len(rows), DRAWN, figsize=(DRAWN, 2.4), layout="constrained")
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        for ax, image in zip(row, images, strict=True):
            ax.imshow(image)
            ax.axis("off")
        row[0].set_title(name, loc="left")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
