"""Draws the method for docs/how-it-works.md, all numbers and choices from the code itself.

  python -m tools.draw_method          (writes docs/method.svg, experts.svg, flops.svg, and a
                                        narrow form of each for phones)

Run it again after a change of the network's sizes, its masking or its routing. Needs matplotlib.
"""

if __name__ == "__main__":
    from microdit_jax.commands.boundary import run_command

    run_command(__file__)

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle
from PIL import Image

from microdit_jax.assets import load
from microdit_jax.commands.parser import Parser
from microdit_jax.data import twemoji
from microdit_jax.models import dit, flops, masking, moe

DOCS = Path(__file__).parent.parent / "docs"
DENSE, EXPERTS, ATTENTION, PALE = "#8f8ba8", "#5b50e8", "#e8a33d", "#ececf4"
MASK_RATIO, CAPTION_LENGTH = 0.75, 77
STAGES = (("1", 32, 0.75), ("2", 32, 0.0), ("3", 64, 0.75), ("4", 64, 0.0))  # side, mask ratio


def block_widths(params: dict, prefix: str) -> list[dict]:
    """Returns the hidden widths of each block, read off the shapes of its weights."""
    blocks = []
    while (block := params.get(f"{prefix}_{len(blocks)}")) is not None:
        shapes = {
            "/".join(key.key for key in path): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(block)
        }
        (attention,) = (s[-1] // 3 for name, s in shapes.items() if name.startswith("attn/qkv"))
        (first,) = (s for name, s in shapes.items() if name.startswith("mlp/w1"))
        blocks.append(
            {"attention": attention, "ffn": first[-1], "experts": len(first) == 3 and first[0]}
        )
    return blocks


def draw_method(out: Path, *, narrow: bool) -> None:
    """Draws one image's way: all patches through the mixer, a quarter through the backbone.

    Args:
      narrow: rows of two steps, numbered, in place of one row with arrows.
    """
    config = dit.MicroDiT_XL_2(input_size=64)
    params = load.abstract_params(config)
    mixer, backbone = (block_widths(params, p) for p in ("patch_mixer", "blocks"))
    t, grid, kept = config.num_tokens, config.grid, masking.num_kept(config.num_tokens, MASK_RATIO)
    mask = masking.make_mask(masking.uniform_noise(jax.random.key(5), 1, t), MASK_RATIO)
    seen = np.asarray(mask.dropped[0] == 0).reshape(grid, grid)

    panels = _narrow_panels() if narrow else _wide_panels()
    figure = panels[0].figure
    step = iter("12345")

    def titled(title: str) -> str:
        return f"{next(step)}. {title}" if narrow else title

    image = _patches(grid)
    hole = np.where(seen[..., None], image, 0.85)
    side = config.input_size
    _grid(panels[0], image, titled(f"{t} patches"), f"{side} x {side} latents")
    title = titled(f"patch mixer: {len(mixer)} blocks")
    _bars(panels[1], mixer, title, f"width {config.patch_mixer_dim}")
    split = "\n" if narrow else " "
    dropped = f"{MASK_RATIO:.0%} dropped,{split}after mixing"
    _grid(panels[2], hole, titled(f"{kept} {'' if narrow else 'patches '}kept"), dropped)
    title = titled(f"backbone: {len(backbone)} blocks")
    _bars(panels[3], backbone, title, f"width {config.dim}, on a quarter of the patches")
    _grid(panels[4], hole, titled(f"{kept} predicted"), f"the loss is{split}measured there")
    for left, right in () if narrow else zip(panels[:-1], panels[1:], strict=True):
        begin, end = left.get_position(), right.get_position()
        y = (begin.y0 + begin.y1) / 2
        figure.add_artist(
            FancyArrowPatch(
                (begin.x1 + 0.004, y), (end.x0 - 0.004, y), transform=figure.transFigure,
                arrowstyle="-|>", mutation_scale=13, color="#55536b", lw=1.2,
            )
        )  # fmt: skip
    labels = {
        f"experts: each of {config.num_experts} is so wide": EXPERTS,
        "dense feed-forward (SwiGLU): hidden width": DENSE,
        "self-attention: width (downwards)": ATTENTION,
    }
    handles = [matplotlib.patches.Patch(color=color, label=text) for text, color in labels.items()]
    if narrow:
        figure.legend(handles=handles, loc=(0.36, 0.15), frameon=False, fontsize=7.5)
    else:
        figure.legend(handles=handles, ncols=3, loc="lower center", frameon=False, fontsize=10)
    title = f"MicroDiT XL/2 at 512 px: {_millions(params)} million weights"
    figure.suptitle(title, fontsize=10 if narrow else 13, y=0.985 if narrow else 0.97)
    _save(figure, out)


def _wide_panels() -> Sequence[Any]:
    figure = Figure(figsize=(13, 4.9), dpi=100, facecolor="white")
    panels = figure.subplots(
        1, 5, gridspec_kw={"width_ratios": [3.1, 3.2, 3.1, 8.4, 3.1], "wspace": 0.34}
    )
    figure.subplots_adjust(left=0.015, right=0.985, top=0.76, bottom=0.17)
    return panels


def _narrow_panels() -> Sequence[Any]:
    figure = Figure(figsize=(4.2, 6.4), dpi=100, facecolor="white")
    rows = figure.subplots(3, 2, gridspec_kw={"width_ratios": [1, 1.9], "hspace": 0.6})
    figure.subplots_adjust(left=0.03, right=0.98, top=0.88, bottom=0.07, wspace=0.15)
    rows[2, 1].set_axis_off()  # the legend's place
    return rows.ravel()[:5]


def draw_experts(out: Path, *, narrow: bool) -> None:
    """Draws expert choice on 16 tokens: who takes whom, and how many take each token.

    Args:
      narrow: tokens from top to bottom in place of left to right.
    """
    t, e, capacity = 16, 8, 2.0
    slots = int(capacity * t / e)
    logits = 1.6 * jax.random.normal(jax.random.key(21), (1, t, e))
    _, index = moe.choose_tokens(logits, slots)
    chosen = np.zeros((e, t), bool)
    chosen[np.arange(e)[:, None], np.asarray(index[0])] = True
    probabilities = np.asarray(jax.nn.softmax(logits[0], axis=-1)).T  # (e, t)

    title = f"Each expert takes the {slots} tokens that want it most"
    reckoned = f"(capacity {capacity:g} x {t} tokens / {e} experts)"
    if narrow:
        _draw_experts_narrow(probabilities, chosen, f"{title}\n{reckoned}", out)
        return
    figure = Figure(figsize=(11, 5.6), dpi=100, facecolor="white", layout="constrained")
    top, bottom = figure.subplots(2, 1, gridspec_kw={"height_ratios": [3.6, 1]}, sharex=True)
    top.imshow(probabilities, cmap="Purples", vmin=0, vmax=1, aspect="auto")
    for expert, token in zip(*np.nonzero(chosen), strict=True):
        top.add_patch(
            Rectangle((token - 0.46, expert - 0.44), 0.92, 0.88, fill=False, ec=ATTENTION, lw=2.4)
        )
    for expert, token in np.ndindex(e, t):
        shade = "white" if probabilities[expert, token] > 0.55 else "#33313f"
        text = f"{probabilities[expert, token]:.2f}"
        top.text(token, expert, text, ha="center", va="center", fontsize=8, color=shade)
    top.set_yticks(range(e), [f"expert {i + 1}" for i in range(e)])
    top.set_title(f"{title} {reckoned}", fontsize=12)
    taken = chosen.sum(axis=0)
    bottom.bar(range(t), taken, color=[EXPERTS if n else "#c9c8d6" for n in taken], width=0.7)
    for token, n in enumerate(taken):
        bottom.text(token, n + 0.12, str(n), ha="center", fontsize=9)
    bottom.set_ylim(0, taken.max() + 1)
    bottom.set_ylabel("experts\nper token")
    bottom.set_xticks(range(t), [f"token {i + 1}" for i in range(t)], fontsize=8, rotation=30)
    for panel in (top, bottom):
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    bottom.set_yticks([])
    _save(figure, out)


def _draw_experts_narrow(
    probabilities: np.ndarray, chosen: np.ndarray, title: str, out: Path
) -> None:
    e, t = chosen.shape
    figure = Figure(figsize=(4.2, 5.4), dpi=100, facecolor="white", layout="constrained")
    left, right = figure.subplots(1, 2, gridspec_kw={"width_ratios": [5.2, 1]}, sharey=True)
    left.imshow(probabilities.T, cmap="Purples", vmin=0, vmax=1, aspect="auto")
    for expert, token in np.ndindex(e, t):
        probability = probabilities[expert, token]
        shade = "white" if probability > 0.55 else "#33313f"
        text = f"{probability:.2f}"
        left.text(expert, token, text, ha="center", va="center", fontsize=8, color=shade)
        if chosen[expert, token]:
            corner = expert - 0.46, token - 0.44
            left.add_patch(Rectangle(corner, 0.92, 0.88, fill=False, ec=ATTENTION, lw=2))
    left.set_xticks(range(e), [str(i + 1) for i in range(e)], fontsize=8)
    left.set_xlabel("expert", fontsize=9)
    left.set_yticks(range(t), [f"token {i + 1}" for i in range(t)], fontsize=8)
    taken = chosen.sum(axis=0)
    right.barh(range(t), taken, color=[EXPERTS if n else "#c9c8d6" for n in taken], height=0.7)
    for token, n in enumerate(taken):
        right.text(n + 0.15, token, str(n), va="center", fontsize=8)
    right.set_xlim(0, taken.max() + 1)
    right.set_xlabel("experts\nper token", fontsize=9)
    right.set_xticks([])
    for panel in (left, right):
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    figure.suptitle(title, fontsize=10)
    _save(figure, out)


def draw_flops(out: Path, *, narrow: bool) -> None:
    """Draws the operations of a forward pass in the four stages, by part: what masking saves.

    Args:
      narrow: for phones.
    """
    size = (4.2, 3.2) if narrow else (9, 3.2)
    figure = Figure(figsize=size, dpi=100, facecolor="white", layout="constrained")
    panel = figure.subplots()
    parts = {"captions and ends": PALE, "patch mixer, all patches": ATTENTION, "backbone": EXPERTS}
    for row, (_, side, ratio) in enumerate(STAGES):
        config = dit.MicroDiT_XL_2(input_size=side)
        total = flops.forward_flops(config, ratio, CAPTION_LENGTH)
        kept = masking.num_kept(config.num_tokens, ratio)
        groups = (
            (config.mixer_blocks(), config.num_tokens, config.patch_mixer_dim),
            (config.backbone_blocks(), kept, config.dim),
        )
        counted = [
            sum(flops.block_flops(config, shape, t, CAPTION_LENGTH, d) for shape in blocks)
            for blocks, t, d in groups
        ]
        left = 0.0
        for (name, color), count in zip(
            parts.items(), [total - sum(counted), *counted], strict=True
        ):
            panel.barh(row, count / 1e9, left=left, color=color, label=name if not row else None)
            left += count / 1e9
        panel.text(left + 8, row, f"{left:.1f}", va="center", fontsize=10)
    between = "\n" if narrow else " "
    names = [f"stage {s}: {8 * side} px,{between}{ratio:.0%} dropped" for s, side, ratio in STAGES]
    panel.set_yticks(range(len(STAGES)), names, fontsize=8 if narrow else 10)
    if narrow:
        panel.set_xlim(0, 1180)
    panel.invert_yaxis()
    panel.set_xlabel("GFLOPs of one image's forward pass (XL/2)", fontsize=9 if narrow else 10)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.tick_params(axis="y", length=0)
    panel.legend(frameon=False, loc="upper right", fontsize=8 if narrow else 10)
    _save(figure, out)


def _patches(grid: int) -> np.ndarray:
    """Returns an image of one colour a patch (Twemoji, CC-BY 4.0), on white."""
    (path,) = (p.path for p in twemoji.list_images() if p.caption == "hot pepper")
    with Image.open(path) as image:
        rgba = image.convert("RGBA").resize((grid, grid), Image.Resampling.BOX)
    rgba = np.asarray(rgba, np.float32) / 255
    return rgba[..., :3] * rgba[..., 3:] + 1 - rgba[..., 3:]


def _grid(panel, image: np.ndarray, title: str, below: str) -> None:
    panel.imshow(image, interpolation="nearest")
    edges = np.arange(len(image) + 1) - 0.5
    panel.hlines(edges, -0.5, len(image) - 0.5, color="white", lw=0.5)
    panel.vlines(edges, -0.5, len(image) - 0.5, color="white", lw=0.5)
    _words(panel, title, below)


def _bars(panel, blocks: list[dict], title: str, below: str) -> None:
    """Draws feed-forward widths upwards, attention's downwards."""
    x = np.arange(len(blocks))
    colors = [EXPERTS if block["experts"] else DENSE for block in blocks]
    panel.bar(x, [block["ffn"] for block in blocks], color=colors, width=0.78)
    panel.bar(x, [-block["attention"] for block in blocks], color=ATTENTION, width=0.78)
    panel.axhline(0, color="#33313f", lw=0.8)
    panel.set_ylim(-1350, 4500)
    widest = max(range(len(blocks)), key=lambda i: blocks[i]["ffn"])
    for index in sorted({0, widest, len(blocks) - 1}):
        block = blocks[index]
        panel.text(index, block["ffn"] + 60, str(block["ffn"]), ha="center", fontsize=8)
        if index in (0, len(blocks) - 1):
            under = -block["attention"] - 270
            panel.text(index, under, str(block["attention"]), ha="center", fontsize=8)
    _words(panel, title, below)


def _words(panel, title: str, below: str) -> None:
    wide = panel.figure.get_figwidth() > 5
    panel.set_title(title, fontsize=11 if wide else 9.5, fontweight="bold", pad=8)
    panel.set_xlabel(below, fontsize=9.5 if wide else 8.5)
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)


def _millions(params: dict) -> str:
    # The stored position embedding is no weight of the network's own, but stands in its file.
    return f"{sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(params)) / 1e6:,.0f}"


def _save(figure: Figure, out: Path) -> None:
    figure.savefig(out, metadata={"Date": None}, facecolor="white")
    print(f"{out.name}: {out.stat().st_size / 1024:.0f} kB")


def main(arguments: Sequence[str]) -> None:
    Parser("tools.draw_method", __doc__).parse_args(arguments)
    matplotlib.rcParams["svg.hashsalt"] = "microdit_jax"  # the same code draws the same bytes
    matplotlib.rcParams["font.family"] = "DejaVu Sans"
    for end, narrow in ((".svg", False), ("-narrow.svg", True)):
        draw_method(DOCS / f"method{end}", narrow=narrow)
        draw_experts(DOCS / f"experts{end}", narrow=narrow)
        draw_flops(DOCS / f"flops{end}", narrow=narrow)
