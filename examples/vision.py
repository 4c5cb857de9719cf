"""Adapt a model of timm to other images: adapters of low rank in its body, its new head trained whole.

    pip install -e ".[examples,clients]"
    python examples/vision.py                             # a tiny vision transformer, 300 steps: half a minute, 2 cores
    python examples/vision.py --model vit_tiny_patch16_224 --pretrained        # with timm's weights, from the hub

The images are drawn: discs, squares, crosses and rings of any color, size and place, on noise. Each batch is new, and
so are the held-out ones.

`rewrite` makes a graph of the model, with images of the size that the model names. LoRA adapts the linear layers of the
frozen body. `Full` trains what images of another kind need anew: the head, the norms, and the convolution that cuts
images into patches. Without `--pretrained` the body is random.

The script prints the sites that train, a progress bar, and the held-out accuracy before and after. It writes
OUT/adapter.safetensors and OUT/vision.png: held-out images with what they are taken for, and the loss of each step.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import timm
import torch
from finetune_options import positive
from finetune_training import warmup_cosine
from matplotlib import pyplot
from torch import Tensor, nn
from tqdm import tqdm

import lora_lite_fx as llfx

CLASSES = ("disc", "square", "cross", "ring")
CONFIG = [
    llfx.LoRA(r=8, alpha=16.0, target_roles=("attention", "mlp")),
    llfx.Full(target_names=("head", "norm", "patch_embed"), target_kinds=("linear", "norm", "conv")),
]
HELD_OUT = 400


def main() -> None:
    """Run the command."""
    args = parse_arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    model = load(args.model, args.pretrained)
    size = image_size(model)
    gm = llfx.rewrite(model, CONFIG)
    print(llfx.inspect(gm))
    held = images(HELD_OUT, size, torch.Generator().manual_seed(1))
    before = accuracy(gm, *held)
    losses = train(gm, size, args.steps)
    after = accuracy(gm, *held)
    print(f"held-out accuracy {before:.0%} before, {after:.0%} after")
    draw(gm, *held, losses, f"held-out images: {after:.0%} right", args.out / "vision.png")

    llfx.save(gm, args.out / "adapter.safetensors")
    again = llfx.load(model, args.out / "adapter.safetensors")
    with torch.no_grad():
        difference = (again.eval()(held[0][:8]) - gm.eval()(held[0][:8])).abs().max()
    print(f"reloaded from {args.out / 'adapter.safetensors'}: logits differ by {difference:.1e}")


def parse_arguments() -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="name of a model of timm (default: its test_vit, for images of 32 pixels)")
    parser.add_argument("--pretrained", action="store_true", help="take timm's weights from the hub")
    parser.add_argument("--steps", type=positive, default=300, help="of 32 images (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder to write to (default: %(default)s)")
    return parser.parse_args()


def load(name: str | None, pretrained: bool) -> nn.Module:
    """Return the model with a new head."""
    if name is None:
        model = timm.create_model("test_vit", pretrained, img_size=32, patch_size=8, num_classes=len(CLASSES))
    else:
        model = timm.create_model(name, pretrained, num_classes=len(CLASSES))
    return model  # type: ignore[no-any-return]


def image_size(model: Any) -> int:
    """Return the side of the images that the model takes."""
    embed = getattr(model, "patch_embed", None)
    height, _ = getattr(embed, "img_size", None) or model.pretrained_cfg["input_size"][1:]
    return int(height)


def images(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images `(count, 3, size, size)`, and return them with the numbers of their classes `(count,)`."""

    def random(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    radius = random(0.5, 0.7, 1, 1)
    place = torch.linspace(-1, 1, size)
    x, y = place.view(1, 1, -1) - random(-0.2, 0.2, 1, 1), place.view(1, -1, 1) - random(-0.2, 0.2, 1, 1)
    far, near = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    round_ = (x**2 + y**2).sqrt()
    shapes = torch.stack(
        [
            round_ < radius,
            far < radius,
            (far < radius) & (near < radius / 4),
            (round_ < radius) & (round_ > radius / 2),
        ]
    )
    labels = torch.randint(len(CLASSES), (count,), generator=generator)
    mask = shapes[labels, torch.arange(count)].unsqueeze(1)
    noise = 0.1 * torch.randn(count, 3, size, size, generator=generator)
    return torch.where(mask, random(0.4, 1, 3, 1, 1), random(-1, 0, 3, 1, 1)) + noise, labels


def train(gm: Any, size: int, steps: int) -> list[float]:
    """Train the adapters and the head, and return the loss of each step."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(llfx.adapter_parameters(gm), lr=5e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup_cosine(step, steps))
    losses = []
    gm.train()
    with tqdm(range(steps), unit="step", desc="training") as bar:
        for _ in bar:
            batch, labels = images(32, size, generator)
            loss = nn.functional.cross_entropy(gm(batch), labels)
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            bar.set_postfix({"loss": f"{losses[-1]:.3f}"})
    return losses


@torch.no_grad()
def accuracy(gm: Any, batch: Tensor, labels: Tensor) -> float:
    """Return the share of images that are taken for what they are."""
    gm.eval()
    guesses = torch.cat([gm(part).argmax(1) for part in batch.split(64)])
    return float((guesses == labels).float().mean())


@torch.no_grad()
def draw(gm: Any, batch: Tensor, labels: Tensor, losses: list[float], title: str, path: Path) -> None:
    """Draw some images with what they are taken for, and the losses."""
    matplotlib.use("Agg")
    figure = pyplot.figure(figsize=(10, 4.5), layout="constrained")
    parts: Any = figure.subfigures(1, 2)
    left, right = parts
    guesses = gm.eval()(batch[:20]).argmax(1)
    for ax, image, label, guess in zip(left.subplots(4, 5).flat, batch, labels, guesses, strict=False):
        ax.imshow((image.movedim(0, -1) * 0.4 + 0.5).clamp(0, 1))
        ax.set_title(CLASSES[guess], fontsize="small", color="green" if guess == label else "red")
        ax.axis("off")
    left.suptitle(title)
    axes = right.subplots()
    axes.plot(losses)
    axes.set(xlabel="step of 32 images", ylabel="training loss (nats)")
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
