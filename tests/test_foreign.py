"""foreign.py: hostile files are refused in one line, soon, and without the memory they ask for, wherever they come in.

A model directory as it should be is changed in one place, and given to the library and to `generate.py`.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from test_convert import TINY, random_state, tiny

import checkpoint
import convert
import foreign
import generate
import resume
import tokenizer
from config import Config, UserError
from foreign import CheckpointError

CONFIG = Config(model=tiny(vocab_size=300, max_position_embeddings=2048))
MAX_SEC, MAX_GROWTH = 5, 200 * 2**20
posix = pytest.mark.skipif(sys.platform == "win32", reason="links and pipes of POSIX")


@contextlib.contextmanager
def cheap() -> Iterator[None]:
    """Neither much time nor, where the system tells the peak since a moment, much memory."""
    reset = Path("/proc/self/clear_refs")
    if reset.exists() and os.access(reset, os.W_OK):
        reset.write_text("5")
    before, start = peak(), time.process_time()
    yield
    assert time.process_time() - start < MAX_SEC
    assert peak() - before < MAX_GROWTH


def peak() -> int:
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), 0)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with its manifest, and beside it as `plain` the model directory alone."""
    config = CONFIG.model
    tok = tokenizer.train_bpe(["ab"], 257)
    state = resume.TrainState(resume.learned(CONFIG), sources="s", tokenizer="t", precision="fp32", step=7)
    files = resume.model_files(CONFIG, tok) | {resume.STATE_FILE: state.to_json()}
    root = tmp_path_factory.mktemp("good")
    tensors = {"model": convert.to_checkpoint(random_state(config), config), "optimizer": {"a": torch.ones(3)}}
    saved = checkpoint.save(root / "run" / "checkpoints", 7, tensors, files, keep=1)
    shutil.copytree(saved, root / "plain")
    (root / "plain" / checkpoint.MANIFEST).unlink()
    return root


@pytest.fixture
def plain(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good / "plain", tmp_path / "plain"))


def refused(folder: Path, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    """By the library and by the program, which says it in one line."""
    with cheap(), pytest.raises(UserError) as failure:
        generate.load(folder)
    assert words in str(failure.value)
    with cheap():
        assert generate.main(["--checkpoint", str(folder), "--prompt", "a", "--max-new-tokens", "1"]) == 2
    out, err = capfd.readouterr()
    assert out == "" and words in err and err[:-1].isprintable() and len(err) <= 1000


def test_what_is_changed_below_is_read_as_it_is(good: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for folder in (good / "plain", good / "run"):
        with cheap():
            assert generate.main(["--checkpoint", str(folder), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    assert resume.TrainState.read(good / "plain").step == 7


# --------------------------------------------------------------------------------------------------------- safetensors


def header_of(file: Path) -> tuple[dict[str, Any], bytes]:
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def safetensors(header: dict[str, Any] | bytes, data: bytes = b"") -> bytes:
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(head).to_bytes(8, "little") + head + data


def changed(**entry: Any) -> Callable[[dict[str, Any], bytes], bytes]:
    def change(header: dict[str, Any], data: bytes) -> bytes:
        header["model.norm.weight"] |= entry
        return safetensors(header, data)

    return change


def shifted(header: dict[str, Any], data: bytes) -> bytes:
    """Every tensor eight bytes on: a hole in front."""
    for name, entry in header.items():
        if name != "__metadata__":
            entry["data_offsets"] = [offset + 8 for offset in entry["data_offsets"]]
    return safetensors(header, bytes(8) + data)


def overlapping(header: dict[str, Any], data: bytes) -> bytes:
    header["z"] = header["model.norm.weight"]
    return safetensors(header, data)


def twice(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header)
    entry = json.dumps(header["model.norm.weight"])
    return safetensors(f'{text[:-1]}, "model.norm.weight": {entry}}}'.encode(), data)


EMPTY = '{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'


def many_tensors(number: int) -> bytes:
    return b"{" + b",".join(b'"%x":' % i + EMPTY.encode() for i in range(number)) + b"}"


HOSTILE: dict[str, tuple[Callable[[dict[str, Any], bytes], bytes], str]] = {
    "a header of 2^60 bytes": (lambda h, d: (2**60).to_bytes(8, "little") + b"{}", "a header of 1152921504606846976"),
    "a header of 2^64 - 1 bytes": (lambda h, d: b"\xff" * 8 + b"{}", "a header of 18446744073709551615 bytes"),
    "a header of 100 MB": (lambda h, d: safetensors(b" " * 10**8), "a header of 100000000 bytes, at most 10000000"),
    "a header beyond the file": (lambda h, d: (999).to_bytes(8, "little") + b"{}", "ends within its header of 999"),
    "a million tensors": (
        lambda h, d: safetensors(many_tensors(10**6)),
        "a header of",
    ),
    "160 thousand tensors": (
        lambda h, d: safetensors(many_tensors(160_000)),
        "names and values, at most 400000",
    ),
    "three million lists": (lambda h, d: safetensors(b'{"a":[' + b"[]," * 3_300_000 + b"1]}"), "names and values"),
    "nested": (lambda h, d: safetensors(b'{"a":' * 90_000), "recursion"),
    "a name of a megabyte": (lambda h, d: safetensors({"x" * 10**6: json.loads(EMPTY)}), "'xxxx"),
    "beyond the file": (changed(shape=[10**6, 6], data_offsets=[0, 24 * 10**6]), "starts at byte"),
    "negative": (changed(data_offsets=[-96, 0]), "'model.norm.weight' is no tensor"),
    "backwards": (changed(data_offsets=[96, 0]), "'model.norm.weight' is no tensor"),
    "a shape that overflows": (changed(shape=[2**40, 2**40]), "'model.norm.weight' is no tensor"),
    "a shape that comes round": (changed(shape=[2**62, 4, 6]), "'model.norm.weight' is no tensor"),
    "another shape": (changed(shape=[23]), "'model.norm.weight' is no tensor"),
    "turned": (changed(shape=[6, 4]), "has shape [6, 4], the config wants [24]"),
    "huge digits": (changed(shape=[10**4000]), "'model.norm.weight' is no tensor"),
    "a number with a point": (changed(shape=[24.0]), "'model.norm.weight' is no tensor"),
    "another dtype": (changed(dtype="I32"), "is of torch.int32, which holds no weights"),
    "no such dtype": (changed(dtype="PICKLE"), "'model.norm.weight' is no tensor"),
    "a dtype that is a list": (changed(dtype=["F32"]), "'model.norm.weight' is no tensor"),
    "more than a tensor": (changed(code="import os"), "'model.norm.weight' is no tensor"),
    "holes": (shifted, "starts at byte 8, the tensor before it ends at 0"),
    "overlapping": (overlapping, "starts at byte"),
    "given twice": (twice, "'model.norm.weight' is given twice"),
    "more bytes": (lambda h, d: safetensors(h, d + b"x"), "bytes of tensors, its header says"),
    "fewer bytes": (lambda h, d: safetensors(h, d[:-1]), "bytes of tensors, its header says"),
    "a pickle": (lambda h, d: pickle.dumps({"a": 1}), "model.safetensors"),
    "an archive of a pickle": (lambda h, d: b"PK\x03\x04" + bytes(100), "model.safetensors"),
    "orders to the terminal": (lambda h, d: safetensors({"\x1b[2J": {}}), "'\\x1b[2J' is no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("what", HOSTILE)
def test_a_hostile_safetensors_file(what: str, plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    make, words = HOSTILE[what]
    file = plain / "model.safetensors"
    file.write_bytes(make(*header_of(file)))
    refused(plain, words, capfd)


def test_the_writer_s_own_files_pass(good: Path) -> None:
    for file in (good / "plain").glob("*.safetensors"):
        foreign.check_header(file)


def test_a_pickle_beside_is_not_opened(plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for name in ("pytorch_model.bin", "model.pt", "optimizer.pt", "training_args.bin"):
        (plain / name).write_bytes(Trap.pickled(tmp_path / "sprung"))
    assert generate.main(["--checkpoint", str(plain), "--prompt", "a", "--max-new-tokens", "1"]) == 0
    (plain / "model.safetensors").unlink()
    capfd.readouterr()
    refused(plain, "no model here", capfd)
    os.rename(plain / "pytorch_model.bin", plain / "model.safetensors")
    refused(plain, "model.safetensors", capfd)
    assert not (tmp_path / "sprung").exists()


class Trap:
    """Unpickled it would leave a file."""

    def __init__(self, path: str):
        self.path = path

    @staticmethod
    def pickled(path: Path) -> bytes:
        return pickle.dumps(Trap(str(path)))

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (self.path, "w")


def test_the_trap_works(tmp_path: Path) -> None:
    pickle.loads(Trap.pickled(tmp_path / "sprung")).close()
    assert (tmp_path / "sprung").exists()


# -------------------------------------------------------------------------------------------------------- names, links

NAMES = [
    "../secret.safetensors", "/etc/passwd", "a/b.safetensors", "..", ".", "", ".hidden", "-rf", "a\\b", "C:model", "~",
    "nul", "COM1.safetensors", "aux.json", "a\0b", "a\n", "a\x1b[2J", "e\u0301", "\u00e9", "\u202eevil", "a.",
    "a" * 300, "a b", "%2e%2e", None, 3, ["a"], {},
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES, ids=repr)
def test_a_hostile_name_in_an_index(name: Any, plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (plain.parent / "secret.safetensors").write_bytes((plain / "model.safetensors").read_bytes())
    (plain / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": name}}
    (plain / "model.safetensors.index.json").write_text(json.dumps(index))
    refused(plain, "is not the plain name of a file", capfd)


@pytest.mark.parametrize("name", [name for name in NAMES if isinstance(name, str)], ids=repr)
def test_a_hostile_name_in_a_manifest(name: str, good: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(good / "run", tmp_path / "run")) / "checkpoints" / "step_00000007"
    manifest = json.loads((folder / checkpoint.MANIFEST).read_text())
    manifest["files"][name] = {"bytes": 0, "sha256": "0" * 64}
    rewrite(folder, manifest)
    for read in (checkpoint.verify, checkpoint.find):
        with pytest.raises(CheckpointError, match="bad entry"), cheap():
            read(folder)
    assert checkpoint.latest(folder.parent) is None


def rewrite(folder: Path, manifest: dict[str, Any]) -> None:
    """With a digest that is right: whoever forges a manifest can count."""
    manifest.pop("digest", None)
    manifest["digest"] = checkpoint._digest(manifest)
    (folder / checkpoint.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


@posix
@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_links_out_of_the_directory(file: str, plain: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    os.rename(plain / file, tmp_path / "elsewhere")
    (plain / file).symlink_to(tmp_path / "elsewhere")
    refused(plain, "a link to", capfd)
    (plain / file).unlink()
    (plain / "inside").write_bytes((tmp_path / "elsewhere").read_bytes())
    (plain / file).symlink_to("inside")
    generate.load(plain)


@posix
def test_a_link_in_a_checkpoint(good: Path, tmp_path: Path) -> None:
    """The bytes are right, but lie where others may change them after they were checked."""
    folder = Path(shutil.copytree(good / "run", tmp_path / "run")) / "checkpoints" / "step_00000007"
    os.rename(folder / "model.safetensors", tmp_path / "elsewhere")
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="a link to"):
        checkpoint.find(folder)
    assert checkpoint.latest(folder.parent) is None


@posix
def test_the_cache_of_hugging_face_is_links(good: Path, tmp_path: Path) -> None:
    repository = tmp_path / "models--owner--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "0123").mkdir(parents=True)
    for number, file in enumerate((good / "plain").iterdir()):
        shutil.copy(file, repository / "blobs" / str(number))
        (repository / "snapshots" / "0123" / file.name).symlink_to(f"../../blobs/{number}")
    assert generate.load(repository / "snapshots" / "0123")[1] is not None
    with pytest.raises(CheckpointError, match="a link to"):
        foreign.plain_file(link(repository / "snapshots" / "0123" / "a", "../../refs"))


def link(path: Path, target: str) -> Path:
    (path.parent / target).resolve().write_text("{}")
    path.symlink_to(target)
    return path


@posix
def test_pipes_and_circles(plain: Path) -> None:
    """Opening a pipe would wait for ever."""
    (plain / "config.json").unlink()
    os.mkfifo(plain / "config.json")
    with pytest.raises(CheckpointError, match=r"config\.json: not a plain file"):
        generate.load(plain)
    (plain / "config.json").unlink()
    (plain / "config.json").symlink_to("config.json")
    with pytest.raises(CheckpointError, match=r"config\.json"):
        generate.load(plain)
    with pytest.raises(UserError, match="nobody-of-that-name"):
        checkpoint.find("~nobody-of-that-name/run")


# ---------------------------------------------------------------------------------------------------------------- JSON

BOMBS = {
    "nested lists": (b'{"a":' + b"[" * 10**5, "recursion"),
    "nested objects": (b'{"a":' * 10**5, "recursion"),
    "a wide list": (b'{"a":[' + b"[]," * 3 * 10**6 + b"1]}", "names and values, at most"),
    "many keys": (b"{" + b",".join(b'"%d":1' % i for i in range(10**6)) + b"}", "names and values, at most"),
    "digits": (b'{"hidden_size":' + b"9" * 10**6 + b"}", "integer string conversion"),
    "spaces": (b" " * (foreign.MAX_JSON_BYTES + 1), "larger than"),
    "given twice": (b'{"a":1,"a":2}', "'a' is given twice"),
    "given twice at the end": (b"{" + b",".join(b'"%d":1' % (i % 299_999) for i in range(300_000)) + b"}", "twice"),
    "no object": (b"[]", "not a JSON object"),
    "no UTF-8": (b'{"a":"\xff"}', "codec can't decode"),
}


@pytest.mark.parametrize("what", BOMBS)
@pytest.mark.parametrize("file", ["config.json", checkpoint.MANIFEST, resume.STATE_FILE])
def test_json_that_is_a_bomb(what: str, file: str, plain: Path) -> None:
    content, words = BOMBS[what]
    (plain / file).write_bytes(content)
    read = resume.TrainState.read if file == resume.STATE_FILE else generate.load
    with pytest.raises(CheckpointError, match=rf"{file}: .*{words}"), cheap():
        read(plain)  # type: ignore[operator]


ABSURD = [
    *({key: 10**9} for key in TINY if key not in ("num_experts_per_tok", "max_position_embeddings")),
    *({"hidden_size": value} for value in (-1, 0, 10**30, 1.5, None, "x", [], True)),
    *({"num_hidden_layers": value} for value in (-1, 0, 10**30, 1.5, None, "x", [], True)),
    {"hidden_size": 2**17, "vocab_size": 2**24, "intermediate_size": 2**20},
    {"n_routed_experts": 2**14, "num_experts_per_tok": 1, "first_k_dense_replace": 3},
    {"rope_theta": -1}, {"rope_theta": 1e308 * 10}, {"rope_scaling": "x" * 10**6}, {"rope_scaling": {"x" * 10**6: 1}},
    {"rope_scaling": {"type": ["yarn"]}}, {"rope_scaling": {"type": "yarn", "factor": "x" * 10**6}},
    {"model_type": "x" * 10**6}, {"hidden_act": "\x1b[2J"}, {"auto_map": {"AutoModel": "m.M"}, "model_type": "m"},
    {"num_nextn_predict_layers": 10**9}, {"num_nextn_predict_layers": [1]}, {"torch_dtype": ["x"], "vocab_size": None},
]  # fmt: skip


@pytest.mark.parametrize("change", ABSURD, ids=lambda change: str(change)[:60])
def test_absurd_sizes(change: dict[str, Any], plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = plain / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    refused(plain, str(plain), capfd)


def test_an_empty_file_for_a_huge_model(plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (plain / "model.safetensors").write_bytes(safetensors({}))
    file = plain / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"num_hidden_layers": 1000, "n_routed_experts": 2**14}))
    refused(plain, "0 tensors, too few for", capfd)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["model.layers.3.embed_tokens.weight", "model.layers.1.mlp.experts.0.up_proj.weight"])
def test_a_tensor_of_another_dtype(name: str, dtype: torch.dtype, plain: Path) -> None:
    """The copies of the MTP layer are compared, the parts of experts joined: never a traceback."""
    config = CONFIG.model
    tensors = {key: tensor.clone() for key, tensor in convert.to_checkpoint(random_state(config), config).items()}
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, plain / "model.safetensors")
    told = ""
    try:
        generate.load(plain)
    except UserError as error:
        told = str(error)
    assert str(plain) in told or "embed_tokens" in name or dtype is torch.float64


# ------------------------------------------------------------------------------------------------ state and tokenizers


def state_of(folder: Path, **changes: Any) -> None:
    values = json.loads((folder / resume.STATE_FILE).read_text())
    (folder / resume.STATE_FILE).write_text(json.dumps(values | changes))


@pytest.mark.parametrize(
    "change",
    [
        {"run_dir": "/elsewhere"}, {"token": "abc"}, {"callbacks": ["os.system"]}, {"schema": 99}, {"step": "7"},
        {"step": 1.5}, {"config": []}, {"cursor": 3}, {"ops": {"attention": 3}}, {"schema": [[]]},
        {"step": -1}, {"step": 10**30}, {"rollbacks": -1}, {"config": {}}, {"config": {"data": {}}},
        {"config": {"data": []}},
        {"config": {"data": {"tokenizer": 3, "sources": []}}}, {"config": {"data": {"tokenizer": "a", "sources": [3]}}},
        {"config": {"data": {"tokenizer": "a", "sources": [{}]}}}, {"loss_scale": {"evil": 1}}, {"cursor": {"a": 1}},
        {"loss_scale": {"value": "1"}}, {"cursor": {"row": "x", "places": []}}, {"cursor": {"row": 1, "places": [3]}},
        {"cursor": {"row": 1, "places": [["/etc/passwd"]]}},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_may_say_what_it_has_to_and_no_more(change: dict[str, Any], plain: Path) -> None:
    state_of(plain, **change)
    with pytest.raises(UserError, match=resume.STATE_FILE), cheap():
        resume.TrainState.read(plain)


def test_a_state_cannot_set_paths(plain: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its configuration is compared with the run's, never used in its place."""
    before = dict(os.environ)
    values = json.loads((plain / resume.STATE_FILE).read_text())["config"]
    values["run"] = {"dir": "/elsewhere"}
    values["hub"] = {"token": "abc", "repo_id": "some/body"}
    state_of(plain, config=values)
    with pytest.raises(UserError, match=r"hub|run\.dir"):
        resume.check_config(resume.TrainState.read(plain), CONFIG, "fp32")
    assert dict(os.environ) == before


TOKENIZERS: dict[str, bytes] = {
    "nothing": b"", "no JSON": b"{", "a list": b"[]", "an object": b"{}", "nested": b'{"model":' + b"[" * 10**5,
    "a pickle": pickle.dumps({"a": 1}), "no UTF-8": b'{"\xff":1}', "digits": b'{"version":' + b"9" * 10**6 + b"}",
    "an unknown model": b'{"version":"1.0","model":{"type":"Exec","cmd":"x"}}',
    "ids that are none": b'{"version":"1.0","model":{"type":"BPE","vocab":{"a":-1},"merges":[]}}',
}  # fmt: skip


@pytest.mark.parametrize("what", TOKENIZERS)
def test_a_hostile_tokenizer(what: str, plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (plain / "tokenizer.json").write_bytes(TOKENIZERS[what])
    refused(plain, "cannot be loaded", capfd)


def test_a_tokenizer_with_code_of_its_own(plain: Path, tmp_path: Path) -> None:
    """`auto_map` names Python files to run: they are not."""
    trap = tmp_path / "sprung"
    (plain / "evil.py").write_text(f"open({str(trap)!r}, 'w')\nclass Evil: pass\n")
    for name in ("tokenizer_config.json", "config.json"):
        values = json.loads((plain / name).read_text())
        values["auto_map"] = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
        values["tokenizer_class"] = "Evil"
        (plain / name).write_text(json.dumps(values))
    with contextlib.suppress(UserError):
        generate.load(plain)
    assert not trap.exists()


@pytest.mark.parametrize("ids", [["a"], 1.5, {}, "x" * 10**6, [1, 1], True])
def test_a_hostile_end_of_text(ids: Any, plain: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (plain / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    assert generate.main(["--checkpoint", str(plain), "--prompt", "a", "--max-new-tokens", "1"]) == 2
    err = capfd.readouterr().err
    assert "generation_config.json: eos_token_id " in err and len(err) <= 1000
