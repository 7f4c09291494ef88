"""A user's own transformer of two streams; `single` and `dual` are what they hand to ditc.

As in SD3's double blocks, image and text have weights of their own and attend to each other together; the last block
gives nothing to the text. In `dual` the image of the first blocks attends to itself beside that, from the same input,
as in SD3.5 medium. The text is a few learned tokens for each label.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ditc.spec import DiffusionSpec, ModelSpec
from ditc.streams import BranchStreams, Output

CHANNELS, SIZE, PATCH = 3, 8, 2
DIM, HEADS, CLASSES, FREQUENCIES = 32, 2, 5, 32
SIDE = SIZE // PATCH
IMAGE_TOKENS, TEXT_TOKENS = SIDE**2, 5
BOTH = ("image", "text")
TEXT = Output(name="text", shape=(TEXT_TOKENS, DIM), stream="text")


class Projections(nn.Module):
    """Queries, keys and values of one stream, (batch, heads, tokens, dim / heads) each, and the way back."""

    def __init__(self, *, gives: bool = True) -> None:
        super().__init__()
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.out = nn.Linear(DIM, DIM) if gives else None

    def heads(self, x: Tensor) -> list[Tensor]:
        return [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).split(DIM, dim=-1)]


def attended(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * (DIM // HEADS) ** -0.5) @ k.transpose(-2, -1)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(DIM, 2 * DIM)
        self.down = nn.Linear(2 * DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x), approximate="tanh"))


def layer_norm() -> nn.LayerNorm:
    return nn.LayerNorm(DIM, elementwise_affine=False, eps=1e-6)


def modulated(normed: Tensor, rows: Tensor, first: int) -> Tensor:
    return normed * (1 + rows[:, first + 1 : first + 2]) + rows[:, first : first + 1]


class Block(nn.Module):
    """A double block. Rows of a stream's modulation: shift, scale, gate of attention, then of the feed-forward.

    A dual block has three more, of the image's attention to itself; the last block's text has shift and scale alone.
    """

    def __init__(self, *, dual: bool, last: bool) -> None:
        super().__init__()
        self.dual, self.last = dual, last
        self.image, self.text = Projections(), Projections(gives=not last)
        self.alone = Projections() if dual else None
        self.image_ff, self.text_ff = FeedForward(), None if last else FeedForward()
        self.norm, self.image_norm, self.text_norm = layer_norm(), layer_norm(), layer_norm()
        self.image_rows, self.text_rows = 9 if dual else 6, 2 if last else 6
        self.modulation = nn.Linear(DIM, (self.image_rows + self.text_rows) * DIM)

    def tables(self, c: Tensor) -> tuple[Tensor, Tensor]:
        """(..., dim) to the rows of image and text, each (..., rows, dim)."""
        rows = self.modulation(nn.functional.silu(c)).unflatten(-1, (-1, DIM))
        image, text = rows.split((self.image_rows, self.text_rows), dim=-2)
        return image, text

    def attention(self, image: Tensor, text: Tensor, rows: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """The outputs to the image, in a dual block two of them, and to the text, where there is one."""
        normed = self.norm(image)
        of_image = self.image.heads(modulated(normed, rows["image"], 0))
        of_text = self.text.heads(modulated(self.norm(text), rows["text"], 0))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(of_text, of_image, strict=True))
        mixed = attended(q, k, v)
        outs = [self.image.out(mixed[:, TEXT_TOKENS:])]
        if self.alone is not None:
            outs.append(self.alone.out(attended(*self.alone.heads(modulated(normed, rows["image"], 6)))))
        if self.text.out is not None:
            outs.append(self.text.out(mixed[:, :TEXT_TOKENS]))
        return tuple(outs)

    def of_image(self, image: Tensor, rows: Tensor) -> Tensor:
        return self.image_ff(modulated(self.image_norm(image), rows, 3))

    def of_text(self, text: Tensor, rows: Tensor) -> Tensor:
        assert self.text_ff is not None
        return self.text_ff(modulated(self.text_norm(text), rows, 3))

    def forward(self, image: Tensor, text: Tensor, rows: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The block as its authors write it: nothing in it knows of branches."""
        outs = list(self.attention(image, text, rows))
        image = image + rows["image"][:, 2:3] * outs.pop(0) + (rows["image"][:, 8:9] * outs.pop(0) if self.dual else 0)
        image = image + rows["image"][:, 5:6] * self.of_image(image, rows["image"])
        if self.text_ff is not None:
            text = text + rows["text"][:, 2:3] * outs.pop(0)
            text = text + rows["text"][:, 5:6] * self.of_text(text, rows["text"])
        return image, text


Parts = dict[str, dict[str, Tensor]]  # "0" -> rows of the first block by stream, ...

# of an output of attention the row that is its gate
GATES = {"image": 2, "alone": 8, "text": 2}


@dataclass(frozen=True)
class AttentionBranch:
    """Joint attention, with an output for each of `names`."""

    name: str
    number: str
    block: Block
    streams: BranchStreams

    def compute(self, h: Mapping[str, Tensor], parts: Parts) -> tuple[Tensor, ...]:
        return self.block.attention(h["image"], h["text"], parts[self.number])

    def merge(self, h: Tensor, out: Tensor, parts: Parts, output: str) -> Tensor:
        rows = parts[self.number]["text" if output == "text" else "image"]
        return h + rows[:, GATES[output], None] * out


@dataclass(frozen=True)
class ImageBranch:
    """The image's feed-forward, from image to image: nothing has to be said of it."""

    name: str
    number: str
    block: Block

    def compute(self, h: Tensor, parts: Parts) -> Tensor:
        return self.block.of_image(h, parts[self.number]["image"])

    def merge(self, h: Tensor, out: Tensor, parts: Parts) -> Tensor:
        return h + parts[self.number]["image"][:, 5:6] * out


@dataclass(frozen=True)
class TextBranch:
    """The text's feed-forward."""

    name: str
    number: str
    block: Block
    streams: BranchStreams

    def compute(self, h: Mapping[str, Tensor], parts: Parts) -> Tensor:
        return self.block.of_text(h["text"], parts[self.number]["text"])

    def merge(self, h: Tensor, out: Tensor, parts: Parts, output: str) -> Tensor:
        return h + parts[self.number]["text"][:, 5:6] * out


class TwoStreams(nn.Module):
    """`depth` double blocks; the first `duals` of them are dual."""

    decoder = None

    def __init__(self, depth: int, duals: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(CHANNELS, DIM, PATCH, stride=PATCH)
        self.positions = nn.Parameter(0.5 * torch.randn(IMAGE_TOKENS, DIM))
        self.time = nn.Sequential(nn.Linear(FREQUENCIES, DIM), nn.SiLU(), nn.Linear(DIM, DIM))
        self.pooled = nn.Embedding(CLASSES + 1, DIM)
        self.tokens = nn.Embedding(CLASSES + 1, TEXT_TOKENS * DIM)
        self.blocks = nn.ModuleList(Block(dual=n < duals, last=n == depth - 1) for n in range(depth))
        self.norm = layer_norm()
        self.final = nn.Linear(DIM, 2 * DIM)
        self.pixels = nn.Linear(DIM, CHANNELS * PATCH**2)
        frequencies = torch.exp(-math.log(1000.0) * torch.arange(FREQUENCIES // 2) / (FREQUENCIES // 2))
        self.register_buffer("frequencies", frequencies, persistent=False)

    @property
    def spec(self) -> ModelSpec:
        streams = {branch.name: branch.streams for branch in self.branches if not isinstance(branch, ImageBranch)}
        return ModelSpec(
            name="two-streams",
            family="mine",
            in_channels=CHANNELS,
            height=SIZE,
            width=SIZE,
            num_classes=CLASSES,
            null_label=CLASSES,
            cfg_channels=2,
            branches=tuple(branch.name for branch in self.branches),
            branch_shape=(IMAGE_TOKENS, DIM),
            streams=streams,
            parameters=sum(p.numel() for p in self.parameters()),
            diffusion=DiffusionSpec(learned_sigma=False),
        )

    @property
    def branches(self) -> list[AttentionBranch | ImageBranch | TextBranch]:
        branches: list[AttentionBranch | ImageBranch | TextBranch] = []
        for number, block in enumerate(self.blocks):
            path, place = f"blocks.{number}", str(number)
            outputs = (Output(name="image"), *[Output(name="alone")] * block.dual, *[TEXT] * (not block.last))
            branches.append(AttentionBranch(f"{path}.attn", place, block, BranchStreams(reads=BOTH, outputs=outputs)))
            branches.append(ImageBranch(f"{path}.ff", place, block))
            if not block.last:
                text = BranchStreams(reads=("text",), outputs=(TEXT,))
                branches.append(TextBranch(f"{path}.ff_text", place, block, text))
        return branches

    def embed_condition(self, t: Tensor, y: Tensor) -> Tensor:
        angles = t.unsqueeze(-1) * self.frequencies
        return self.time(torch.cat([angles.sin(), angles.cos()], -1)) + self.pooled(y)

    def condition(self, t: Tensor, y: Tensor) -> dict[str, Tensor]:
        c = self.embed_condition(t[:, None], y[None])  # (steps, batch, dim)
        tables = {}
        for number, block in enumerate(self.blocks):
            tables[f"image{number}"], tables[f"text{number}"] = block.tables(c)
        text = self.tokens(y).unflatten(-1, (TEXT_TOKENS, DIM))  # (batch, tokens, dim)
        return {**tables, "final": self.final(c).unflatten(-1, (2, DIM)), "tokens": text.expand(t.shape[0], -1, -1, -1)}

    def unpack(self, step: dict[str, Tensor]) -> Parts:
        blocks = {str(n): {stream: step[f"{stream}{n}"] for stream in BOTH} for n in range(len(self.blocks))}
        return {**blocks, "model": {"final": step["final"], "tokens": step["tokens"]}}

    def embed(self, x: Tensor) -> Tensor:
        return self.patches(x).flatten(2).transpose(1, 2) + self.positions

    def context(self, parts: Parts) -> dict[str, Tensor]:
        return {"text": parts["model"]["tokens"]}

    def head(self, h: Tensor, parts: Parts) -> Tensor:
        shift, scale = parts["model"]["final"].split(1, dim=1)
        cut = self.pixels(self.norm(h) * (1 + scale) + shift).reshape(-1, SIDE, SIDE, CHANNELS, PATCH, PATCH)
        return cut.permute(0, 3, 1, 4, 2, 5).reshape(-1, CHANNELS, SIZE, SIZE)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        c = self.embed_condition(t, y)
        image, text = self.embed(x), self.tokens(y).unflatten(-1, (TEXT_TOKENS, DIM))
        for block in self.blocks:
            image, text = block(image, text, dict(zip(BOTH, block.tables(c), strict=True)))
        return self.head(image, {"model": {"final": self.final(c).unflatten(-1, (2, DIM))}})


def model_of(depth: int, duals: int) -> TwoStreams:
    """The model with seeded random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return TwoStreams(depth, duals)


def single() -> TwoStreams:
    """As SD3."""
    return model_of(3, 0)


def dual() -> TwoStreams:
    """As SD3.5 medium."""
    return model_of(3, 2)
