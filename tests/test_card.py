"""card.py: a card that others can read and load from, whatever stands in names, data and samples."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

import card
import config

HOSTILE = (
    "<script>alert(1)</script>", "[click](javascript:alert(1))", "![x](https://evil/x.png)", "a|b", "`code`", "# head",
    "---\nlicense: evil\n---", "*bold* _it_ ~~no~~", "<!-- -->", "&lt;b&gt;", "https://evil.example/x", "\x1b[31mred",
    "\u202eevil", "a\r\nb", "<img src=x onerror=y>", "\\", "${x}", "1. list", "me@evil.example",
)  # fmt: skip


def entries(number: int = 50, **more: Any) -> list[dict[str, Any]]:
    lines = [{"step": s, "tokens": 1000 * s, "loss": 8 * math.exp(-s / 20) + 2} for s in range(1, number + 1)]
    for line in lines[9::10]:
        line |= {"val_loss": line["loss"] + 0.1, "val_bpb": 1.25}
    return [{**line, **more} for line in lines]


def run_folder(tmp_path: Path, *overrides: str, lines: list[dict[str, Any]] | None = None) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    text = config.to_yaml(config.load("quickstart", overrides))
    (folder / "config.yaml").write_text(text, encoding="utf-8")
    told = "".join(json.dumps(line) + "\n" for line in (entries() if lines is None else lines))
    (folder / "metrics.jsonl").write_text(told + '{"step": 51, "los', encoding="utf-8")
    return folder


def made(folder: Path, step: int = 50) -> tuple[dict[str, Any], str, str]:
    """The front matter, the text and the picture."""
    files = card.files(folder, repo_id="me/model", step=step, total=2_800_000, active=1_200_000)
    text = files["README.md"].decode()
    front, body = re.fullmatch(r"---\n(.*?)---\n(.*)", text, re.DOTALL).groups()  # type: ignore[union-attr]
    return yaml.safe_load(front), body, files.get(card.PICTURE, b"").decode()


def test_the_card_of_a_run(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    samples = "## Step 10\n\n> **Once** old\n\n## Step 50\n\n> **It is a truth** that\n> two lines\n\n"
    (folder / "samples.md").write_text(samples, encoding="utf-8")
    front, body, picture = made(folder)
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["deepseek_v3", "base-model", "mixture-of-experts", "trained-from-scratch"],
    }
    assert body.startswith(f"{card.MARK}\n\n# quickstart\n")
    for said in (
        "2.8 million parameters, 1.2 million of them active per token",
        "the state after step 50.",
        "It is a base model",
        "No license is given here",
        "| steps, tokens | 50, 50,000 |",
        "| data | austen\\.parquet |",
        "8 routed, 2 of them for a token, and 1 shared",
        "held-out documents of the same data: 2.7567 nats per token",
        "in bits per byte: 1.2500",
        "No benchmark was run.",
        f"![the loss over tokens of training]({card.PICTURE})",
        'AutoModelForCausalLM.from_pretrained("me/model")',
        "python generate.py --checkpoint me/model --prompt",
        "After step 50, as they came:\n\n    It is a truth that\n    two lines\n",
    ):
        assert said in body, said
    assert "old" not in body.partition("## Samples")[2]
    assert ElementTree.fromstring(picture).tag.endswith("svg")
    assert ModelCard(f"---\n{yaml.safe_dump(front)}---\n{body}").data.pipeline_tag == "text-generation"


def test_an_earlier_step_knows_nothing_of_later_ones(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    (folder / "samples.md").write_text("## Step 50\n\n> **later**\n", encoding="utf-8")
    _, body, picture = made(folder, step=20)
    assert "| steps, tokens | 20, 20,000 |" in body and "Samples" not in body
    assert len(re.findall("<circle", picture)) == 2


def test_data_of_the_hub_is_named_and_local_places_are_not(tmp_path: Path) -> None:
    source = f"{{path: {tmp_path}/secret place/mine.jsonl}}"
    folder = run_folder(tmp_path, f"data.sources=[{{path: HuggingFaceFW/fineweb-edu, name: sample-10BT}}, {source}]")
    front, body, _ = made(folder)
    assert front["datasets"] == ["HuggingFaceFW/fineweb-edu"]
    assert "| data | HuggingFaceFW/fineweb\\-edu sample\\-10BT; mine\\.jsonl |" in body
    assert "secret place" not in body and str(tmp_path) not in body


def test_a_run_that_has_told_nothing_yet(tmp_path: Path) -> None:
    folder = run_folder(tmp_path, lines=[])
    _, body, picture = made(folder)
    assert not picture and "Evaluation" not in body and "Samples" not in body and "![" not in body
    (folder / "metrics.jsonl").unlink()
    assert made(folder)[1] == body


@pytest.mark.parametrize("text", HOSTILE)
def test_names_are_text(text: str) -> None:
    escaped = card.plain(text)
    assert "\n" not in escaped and "\x1b" not in escaped and "\u202e" not in escaped and "\r" not in escaped
    assert "<" not in escaped and ">" not in escaped
    assert not re.search(r"(?<!\\)(\\\\)*[`*_\[\]()#|~!]", escaped)
    markdown = pytest.importorskip("markdown_it")
    html = markdown.MarkdownIt("commonmark").enable(["table", "strikethrough"]).render(f"| a |\n|---|\n| {escaped} |\n")
    assert set(re.findall(r"<(/?\w+)", html)) == {
        x for t in ("table", "thead", "tbody", "tr", "th", "td") for x in (t, f"/{t}")
    }


def test_samples_are_text(tmp_path: Path) -> None:
    folder = run_folder(tmp_path)
    quoted = "\n\n".join("> " + text.replace("\n", "\n> ") for text in (*HOSTILE, "## Step 9", "```", "a" * 5000))
    (folder / "samples.md").write_text(f"## Step 50\n\n{quoted}\n", encoding="utf-8", newline="")
    _, body, _ = made(folder)
    block = body.partition("as they came:\n\n")[2]
    assert block and all(not line or line.startswith("    ") for line in block.split("\n"))
    assert len(block) < 60 * 210 and "\x1b" not in block and "\u202e" not in block and "\r" not in block
    markdown = pytest.importorskip("markdown_it")
    tokens = markdown.MarkdownIt("commonmark").parse(body)
    assert tokens[-1].type == "code_block" and "<script>" in tokens[-1].content
    assert not [token for token in tokens if token.type == "html_block" and token.content.strip() != card.MARK]


def test_no_secret_is_told(tmp_path: Path) -> None:
    token = "hf_" + "Canary" * 6
    folder = run_folder(tmp_path)
    (folder / "samples.md").write_text(f"## Step 50\n\n> **x** {token}\n", encoding="utf-8")
    assert token not in made(folder)[1] and token not in card.plain(f"a {token}")


@pytest.mark.parametrize(
    "lines",
    [
        [],
        entries(1),
        [{"step": s, "tokens": 5, "loss": 1.0} for s in range(9)],
        [{"step": s, "tokens": s, "loss": None} for s in range(9)],
        [{"step": s, "tokens": s, "loss": "<b>"} for s in range(9)],
        [{"step": s} for s in range(9)],
    ],
)
def test_no_picture_without_a_line(lines: list[dict[str, Any]]) -> None:
    assert card.curve(lines) == ""


def test_the_picture_shows_what_was_measured() -> None:
    picture = ElementTree.fromstring(card.curve(entries(5000)))
    (line,) = picture.iter("{http://www.w3.org/2000/svg}polyline")
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert 200 <= len(points) <= card.MOST_POINTS
    across, down = zip(*points, strict=True)
    assert list(across) == sorted(across) and list(down) == sorted(down)  # loss falls: y grows downwards
    assert across[0] >= card.LEFT and across[-1] == card.WIDTH - card.RIGHT
    labels = [text.text for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert "5M" in labels and "2.00" in labels
    spiky = entries(1000)
    spiky[500]["loss"] = 1e9
    heights = re.findall(r'text-anchor="end" fill="#333333">([\d.]+)<', card.curve(spiky))
    assert max(map(float, heights)) < 20  # one spike does not flatten the rest
    flat = [{"step": s, "tokens": s, "loss": 2.0} for s in range(1, 9)]
    assert ElementTree.fromstring(card.curve(flat)) is not None
