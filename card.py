"""The model card of a run: README.md and a picture of its loss, from the run's own files.

Names, data and samples are text of others: they are escaped, or stand in blocks where Markdown and HTML mean nothing.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

import tracker
from text import clean

MARK = "<!-- written by the training run: delete this line, and it leaves the card alone -->"
PICTURE = "loss.svg"
MOST_POINTS = 400  # of a curve
MOST_SAMPLE_LINES = 60
MOST_COLUMNS = 200  # of a line of a sample
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/\w[\w.-]{0,95}", re.ASCII)
FILES = (".parquet", ".arrow", ".jsonl", ".json", ".txt", ".gz", ".zst")
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 720, 400, 64, 16, 24, 48  # of the picture, pixels

Points = list[tuple[float, float]]


def files(run_dir: Path, *, repo_id: str, step: int, total: int, active: int) -> dict[str, bytes]:
    """The card's files for the state after `step`, from config.yaml, metrics.jsonl and samples.md of a run's folder.

    Args:
        total, active: parameters, in all and of one token.
    """
    config = yaml.safe_load((run_dir / "config.yaml").read_text(encoding="utf-8"))
    entries = tracker.logged(run_dir, step)
    samples = read_samples(run_dir / "samples.md", step)
    text = render(config, entries, samples, repo_id=repo_id, step=step, total=total, active=active)
    found = {"README.md": text.encode()}
    if picture := curve(entries):
        found[PICTURE] = picture.encode()
    return found


def read_samples(path: Path, step: int) -> tuple[int, list[str]]:
    """The newest samples up to a step: of which step, and their lines."""
    newest: tuple[int, list[str]] = (0, [])
    for when, text in tracker.entries(path, most=step):
        if newest[0] <= when:
            lines = text.partition("\n")[2].strip().split("\n")
            newest = int(when), [line.removeprefix(">").removeprefix(" ") for line in lines]
    return newest


def render(
    config: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], samples: tuple[int, list[str]], *, repo_id: str,
    step: int, total: int, active: int,
) -> str:  # fmt: skip
    """The text of README.md."""
    sources = config["data"]["sources"]
    datasets = sorted({source["path"] for source in sources if _on_hub(source["path"])})
    front: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["deepseek_v3", "base-model", "mixture-of-experts", "trained-from-scratch"],
    }
    if datasets:
        front["datasets"] = datasets
    name = config["run"]["name"] or repo_id.partition("/")[2]
    about = (
        f"A DeepSeek-V3 language model of {total / 1e6:,.1f} million parameters, {active / 1e6:,.1f} million of them "
        f"active per token, trained from scratch: the state after step {step:,}. It is a base model: it goes on with a "
        "text. It was not taught to follow instructions, nor kept from false, biased or offensive text, of which its "
        "data may hold some.\n\nNo license is given here: whoever publishes the model states one.\n"
    )
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n{MARK}\n\n# {plain(name)}\n",
        about,
        _table(config, entries, step),
        _results(entries),
        _use(repo_id),
        _sampled(*samples),
    ]
    return "\n".join(part for part in parts if part)


def _table(config: Mapping[str, Any], entries: Sequence[Mapping[str, Any]], step: int) -> str:
    model, data, train = config["model"], config["data"], config["train"]
    tokens = last(entries, "tokens") or step * train["batch_tokens"]
    experts = (
        f"{model['n_routed_experts']} routed, {model['num_experts_per_tok']} of them for a token, and "
        f"{model['n_shared_experts']} shared, of width {model['moe_intermediate_size']}"
    )
    rows = [
        ("steps, tokens", f"{step:,}, {tokens:,}"),
        ("data", "; ".join(_source(source) for source in data["sources"])),
        ("tokenizer", f"{plain(_unplaced(data['tokenizer']))}, {model['vocab_size']:,} rows"),
        ("layers, width", f"{model['num_hidden_layers']}, {model['hidden_size']}"),
        ("experts", experts),
        ("attention", f"{model['num_attention_heads']} heads over a latent of {model['kv_lora_rank']}"),
        ("context", f"{data['seq_len']} tokens in training"),
        ("tokens of a step", f"{train['batch_tokens']:,}"),
        ("optimizer", f"{plain(config['optim']['name'])}, learning rate {config['optim']['lr']:g}"),
    ]
    return "## How it was made\n\n| | |\n|---|---|\n" + "".join(f"| {key} | {value} |\n" for key, value in rows)


def _results(entries: Sequence[Mapping[str, Any]]) -> str:
    loss, val_loss, val_bpb = (last(entries, key) for key in ("loss", "val_loss", "val_bpb"))
    told = []
    if val_loss is not None:
        told.append(f"- loss on held-out documents of the same data: {val_loss:.4f} nats per token")
    if val_bpb is not None:
        told.append(f"- the same in bits per byte: {val_bpb:.4f}")
    if loss is not None:
        told.append(f"- loss in training: {loss:.4f} nats per token")
    if not told:
        return ""
    picture = f"\n![the loss over tokens of training]({PICTURE})\n" if curve(entries) else ""
    return "## Evaluation\n\nNo benchmark was run.\n\n" + "\n".join(told) + "\n" + picture


def _use(repo_id: str) -> str:
    return f"""## How to use it

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{repo_id}")
model = AutoModelForCausalLM.from_pretrained("{repo_id}")
tokens = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**tokens, max_new_tokens=50)[0]))
```

With the program that trained it:

```bash
python generate.py --checkpoint {repo_id} --prompt "Once upon a time"
```

The files `optimizer*.safetensors`, `rng*.safetensors`, `training_state.json`, `manifest.json` and `LATEST.json` are for
going on with the training; nothing else needs them.
"""


def _sampled(step: int, lines: list[str]) -> str:
    """An indented block: whatever the model wrote, nothing in it is markup."""
    shown = [line for text in lines for line in clean(text).replace("**", "").splitlines() or [""]]
    if not any(line.strip() for line in shown):
        return ""
    block = "".join(f"    {line[:MOST_COLUMNS]}".rstrip() + "\n" for line in shown[:MOST_SAMPLE_LINES])
    return f"## Samples\n\nAfter step {step:,}, as they came:\n\n{block}"


def plain(text: object) -> str:
    """Text of others on one line, as text: no markup, no HTML, no link, no end of a table's cell."""
    line = " ".join(clean(str(text)).split())[:300]
    return html.escape(re.sub(r"([\\`*_{}\[\]()#+!|~:.@-])", r"\\\1", line), quote=False)


def _source(source: Mapping[str, Any]) -> str:
    more = [str(source[key]) for key in ("name", "revision") if source.get(key)]
    return plain(" ".join([_unplaced(source["path"]), *more]))


def _on_hub(path: str) -> bool:
    return bool(HUB_NAME.fullmatch(path)) and not path.lower().endswith(FILES) and not Path(path).exists()


def _unplaced(path: str) -> str:
    """A name on the Hub as it is; of a local path the last part, not where it is."""
    return path if _on_hub(path.partition("@")[0]) else Path(path).name


def last(entries: Iterable[Mapping[str, Any]], key: str) -> Any:
    """The last finite number under a key; None where there is none."""
    return next((entry[key] for entry in reversed(list(entries)) if _finite(entry.get(key))), None)


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


# ------------------------------------------------------------------------------------------------------------- picture


def curve(entries: Sequence[Mapping[str, Any]]) -> str:
    """An SVG of the training loss (a line) and the validation loss (dots) over tokens; empty where there is no line."""
    loss, val = (_points(entries, key) for key in ("loss", "val_loss"))
    if len(loss) < 2 or loss[-1][0] <= loss[0][0]:
        return ""
    heights = sorted(y for _, y in loss + val)
    low, high = heights[0], heights[min(len(heights) - 1, round(0.995 * len(heights)))]  # a spike would flatten all
    high = max(high, low + 1e-3)
    most = max(x for x, _ in loss + val)

    def at(x: float, y: float) -> tuple[float, float]:
        share = min(1.0, max(0.0, (y - low) / (high - low)))
        return LEFT + (WIDTH - LEFT - RIGHT) * x / most, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share

    line = " ".join("{:.1f},{:.1f}".format(*at(x, y)) for x, y in _thinned(loss))
    dots = "".join('<circle cx="{:.1f}" cy="{:.1f}" r="3" fill="#d1495b"/>'.format(*at(x, y)) for x, y in _thinned(val))
    grid = "".join(_grid_line(at, low + (high - low) * part / 4, most) for part in range(5))
    marks = "".join(_tokens_mark(at, most * part / 4, low) for part in range(5))
    legend = "training loss (line)" + (", validation loss (dots)" if val else "") + ", nats per token"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="sans-serif" font-size="12">\n<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>\n'
        f'<text x="{LEFT}" y="16" fill="#333333">{legend}</text>\n{grid}\n{marks}\n'
        f'<text x="{(LEFT + WIDTH) // 2}" y="{HEIGHT - 8}" text-anchor="middle" fill="#333333">tokens</text>\n'
        f'<polyline points="{line}" fill="none" stroke="#00798c" stroke-width="1.5"/>\n{dots}\n</svg>\n'
    )


def _points(entries: Sequence[Mapping[str, Any]], key: str) -> Points:
    found = {}
    for entry in entries:
        if _finite(entry.get(key)) and _finite(entry.get("tokens")):
            found[float(entry["tokens"])] = float(entry[key])
    return sorted(found.items())


def _thinned(points: Points) -> Points:
    """At most about MOST_POINTS of them, each the mean of its neighbours."""
    each = max(1, -(-len(points) // MOST_POINTS))
    groups = [points[first : first + each] for first in range(0, len(points), each)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _grid_line(at: Any, y: float, most: float) -> str:
    (left, height), (right, _) = at(0.0, y), at(most, y)
    return (
        f'<line x1="{left:.1f}" y1="{height:.1f}" x2="{right:.1f}" y2="{height:.1f}" stroke="#dddddd"/>'
        f'<text x="{left - 6:.1f}" y="{height + 4:.1f}" text-anchor="end" fill="#333333">{y:.2f}</text>'
    )


def _tokens_mark(at: Any, x: float, low: float) -> str:
    across, height = at(x, low)
    size, unit = next(((s, u) for s, u in ((1e9, "B"), (1e6, "M"), (1e3, "k")) if x >= s), (1.0, ""))
    return (
        f'<text x="{across:.1f}" y="{height + 18:.1f}" text-anchor="middle" fill="#333333">{x / size:.3g}{unit}</text>'
    )
