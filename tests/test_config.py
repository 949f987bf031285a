"""The configuration: presets, contradictions, what a mistake is told, and that none of it needs torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

import config
from config import CONFIGS, ModelConfig, UserError
from options import Schema

ROOT = Path(config.__file__).parent
PRESETS = ["quickstart", "30m", "100m", "mini", "1b", "2b", "5b", "10b", "16b", "20b", "671b"]

# override: words that its message must hold besides the key's path
MISTAKES = {
    # wrong types
    "train.steps=10.5": "10.5 must be an integer >= 1, or null",
    "train.steps=1e3": "1000.0 must be an integer >= 1, or null",
    "train.steps=true": "true must be an integer >= 1, or null",
    'train.steps="12"': "'12' must be an integer",
    "train.steps=ten": "'ten' must be an integer",
    "train.steps=[1]": "[1] must be an integer",
    "train.steps={a: 1}": "{'a': 1} must be an integer",
    "train.batch_tokens=null": "null must be an integer >= 1",
    "train.batch_tokens=": "null must be an integer >= 1",
    "train.recompute=1": "1 must be one of none, selective, full",
    "train.compile=1": "1 must be true or false",
    "train.compile=yes": "'yes' must be true or false",
    "model.norm_topk_prob=null": "null must be true or false",
    "optim.lr=fast": "'fast' must be a number > 0 and <= 1",
    "optim.lr=true": "true must be a number",
    "optim.lr='0.1'": "'0.1' must be a number",
    "run.name=null": "null must be text",
    "run.dir=[a]": "['a'] must be text",
    "data.sources=[]": "must be text, or a list of texts and of mappings with the keys path, name, split",
    "data.sources=[{name: x}]": "data.sources[0].path is missing; it must be text, not empty",
    "data.sources=[{path: ''}]": "data.sources[0].path = '' must be text, not empty",
    "data.sources=[a, {path: b, nme: c}]": "unknown key data.sources[1].nme = 'c'; did you mean data.sources[].name?",
    "data.sources=": "'' must be text, not empty",
    "sample.prompts=[a, [b]]": "sample.prompts[1] = ['b'] must be text or a list of texts",
    "model.rope_scaling=4": "4 must be a mapping with the keys type, factor, original_max_position_embeddings",
    "model.rope_scaling={}": "model.rope_scaling.factor is missing; it must be a number > 1",
    "model.rope_scaling={factor: 4, type: linear}": "model.rope_scaling.type = 'linear' must be one of yarn",
    # out of range
    "train.steps=0": "0 must be an integer >= 1, or null",
    "train.steps=-5": "-5 must be an integer >= 1",
    "train.seed=-1": "-1 must be an integer >= 0",
    "train.seed=99999999999999999999": "must be an integer >= 0 and < 9223372036854775808",
    "train.mtp_switch=1.5": "1.5 must be a number >= 0 and <= 1",
    "train.grad_clip=0": "0 must be a number > 0",
    "optim.lr=0": "0 must be a number > 0 and <= 1",
    "optim.lr=-1e-3": "-0.001 must be a number",
    "optim.lr=.nan": "nan must be a finite number > 0 and <= 1",
    "optim.lr=nan": "'nan' must be a number",
    "optim.lr=.inf": "inf must be a finite number",
    "train.grad_clip=1e300": "1e+300 must be a number > 0, and at most 1e+30",
    "optim.weight_decay=1e999": "inf must be a finite number >= 0",
    "optim.eps=1e-300": "1e-300 must be a number >= 1e-20",
    "optim.beta1=1": "1 must be a number >= 0 and < 1",
    "data.val_fraction=0.5": "0.5 must be a number >= 0 and < 0.5",
    "data.seq_len=1": "1 must be an integer >= 2",
    "data.workers=65": "65 must be an integer >= 0 and <= 64",
    "data.tokenizer=": "'' must be text, not empty",
    "model.qk_rope_head_dim=63": "63 must be an integer >= 2 and <= 16384 and a multiple of 2",
    "model.num_nextn_predict_layers=9": "9 must be an integer >= 0 and <= 8",
    "model.q_lora_rank=0": "0 must be an integer >= 1 and <= 131072, or null",
    "model.hidden_size=1000000000": "1000000000 must be an integer >= 1 and <= 131072",
    "model.rope_scaling={factor: 1}": "model.rope_scaling.factor = 1 must be a number > 1",
    "eval.every_steps=0": "0 must be an integer >= 1",
    "checkpoint.keep=0": "0 must be an integer >= 1",
    "sample.temperature=-1": "-1 must be a number >= 0",
    "train.precision=fp8": "'fp8' must be one of auto, fp32, bf16, fp16",
    "optim.name=sgd": "'sgd' must be one of muon, adamw",
    "optim.schedule=on": "'on' must be one of wsd, cosine",
    "run.name=../x": "'../x' is no name for a folder",
    "run.name=a/b": "is no name for a folder",
    "run.name=-x": "is no name for a folder",
    "run.name=.": "is no name for a folder",
    "run.name=x.": "is no name for a folder",
    "run.name=con.txt": "is no name for a folder",
    "run.name=\x1b[31m": "'\\x1b[31m' is no name for a folder",
    # contradictions
    "data.seq_len=100": "train.batch_tokens = 131072 must be a multiple of data.seq_len = 100, such as 131100",
    "train.batch_tokens=100": "must be a multiple of data.seq_len = 2048, such as 2048",
    "data.seq_len=8192": "must be at most model.max_position_embeddings = 4096",
    "model.max_position_embeddings=512": "data.seq_len = 2048 must be at most model.max_position_embeddings = 512",
    "train.micro_batch=65": "must be at most 64, the rows of a step: train.batch_tokens = 131072 / data.seq_len = 2048",
    "model.rms_norm_eps=1e-5": "must be 1e-6: transformers fixes it",
    "model.num_hidden_layers=62": "must be at most 61: transformers takes layer 61",
    "model.n_group=3": "model.n_routed_experts = 64 must be a multiple of model.n_group = 3",
    "model.n_group=64": "at least two for each group",
    "model.n_routed_experts=1": "at least two for each group",
    "model.topk_group=2": "must be at most model.n_group = 1",
    "model.num_experts_per_tok=65": "must be at most 64, the experts of model.topk_group = 1 groups",
    "model.first_k_dense_replace=13": "must be at most model.num_hidden_layers = 12",
    "optim.weight_decay=1e30": "optim.lr = 0.002 times optim.weight_decay = 1e+30 must be below 1",
    "optim.warmup=0.9": "and optim.decay = 0.3 must sum to at most 1",
    "model.rope_scaling={factor: 4, beta_fast: 1}": "beta_fast = 1.0 must be above model.rope_scaling.beta_slow = 1",
    # no such key
    "train.stpes=3": "did you mean train.steps? It is an integer >= 1, or null",
    "train.lr=3": "did you mean optim.lr? It is a number > 0 and <= 1",
    "lr=3": "did you mean optim.lr?",
    "data.every_steps=3": "did you mean log.every_steps, eval.every_steps, sample.every_steps or checkpoint.every_",
    "optim.learning_rate=1": "valid keys are optim.name, optim.lr,",
    "nothing.like_it=1": "valid sections are run, model, data,",
    "train.\x1b[31m=1": "unknown key 'train.\\x1b[31m' = '1'",
    "train.steps.x=1": "set train.steps as a whole; it is an integer >= 1, or null",
    "data.sources.path=x": "set data.sources as a whole",
    "data.sources[0].path=x": "set data.sources as a whole",
    # no key=value
    "train=5": "train is a section; set one of its keys",
    "train.steps": "must have the form train.steps=VALUE",
    "nonsense": "must have the form section.key=value, such as train.steps=100",
    "=5": "must have the form section.key=value",
    "train.steps=[1": "is not valid YAML",
    "train.steps=*a": "aliases (*name) are not supported",
    "train.steps=!!python/name:os.x 1": "tags are not supported",
}


def refused(name: str, *overrides: str) -> str:
    with pytest.raises(UserError) as failure:
        config.load(name, overrides)
    return str(failure.value)


@pytest.mark.parametrize("override", MISTAKES)
def test_a_mistake_on_the_command_line(override: str) -> None:
    message = refused("mini", override)
    key = override.partition("=")[0]
    assert MISTAKES[override] in message
    assert (key if key.isprintable() else repr(key)) in message
    assert "command line" in message.partition(": ")[0]
    assert message.isprintable() and len(message) < 600, "one line, nothing for the terminal to obey"
    assert not any(word in message.lower() for word in ("pydantic", "http", "input should", "traceback"))


ONLY_THERE = ("whole", "not valid YAML", "aliases", "valid sections", "must have the form", "is a section")
IN_A_FILE = [
    override
    for override, words in MISTAKES.items()
    if re.match(r"\w+\.[\w.]+=.", override) and override.isprintable() and not any(w in words for w in ONLY_THERE)
]


@pytest.mark.parametrize("override", IN_A_FILE)
def test_the_same_mistake_in_a_file(override: str, tmp_path: Path) -> None:
    key, _, value = override.partition("=")
    tree = (ROOT / "configs" / "mini.yaml").read_text(encoding="utf-8")
    *sections, leaf = key.split(".")
    file = tmp_path / "mine.yaml"
    lines = [line for line in tree.splitlines() if not line.startswith(f"  {leaf}:")]
    if f"{sections[0]}:" not in lines:
        lines.append(f"{sections[0]}:")
    here = lines.index(f"{sections[0]}:") + 1
    for depth, section in enumerate(sections[1:], 1):
        lines.insert(here, "  " * depth + f"{section}:")
        here += 1
    lines.insert(here, "  " * len(sections) + f"{leaf}: {value}")
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    message = refused(str(file))
    assert MISTAKES[override] in message and key in message and message.isprintable()
    assert f"mine.yaml:{here + 1}" in message


def test_contradictions_name_both_places() -> None:
    message = refused("mini", "data.seq_len=100")
    line = (CONFIGS / "mini.yaml").read_text(encoding="utf-8").splitlines().index("  batch_tokens: 131072") + 1
    assert message.startswith(f"configs/mini.yaml:{line}, command line: train.batch_tokens")
    assert "model.vocab_size = 200 must be at least 257" in refused(
        "mini", "model.vocab_size=200", "data.tokenizer=bpe"
    )


def test_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shell does not expand `~` after `run.dir=`; a folder of that name would be a trap."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert config.load("mini", ["run.dir=~/runs"]).run.dir == str(tmp_path / "runs")


def test_a_run_s_own_configuration(tmp_path: Path) -> None:
    """The default folder follows the name; a folder that was given stays."""
    for folder, wanted in (("runs/a", "runs/b"), ("elsewhere", "elsewhere")):
        (tmp_path / "config.yaml").write_text(f"run: {{name: a, dir: {folder}}}")
        assert config.load(str(tmp_path / "config.yaml"), ["run.name=b"]).run.dir == wanted


def test_which_file_is_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "did you mean mini? Presets are" in refused("mnii")
    assert "did you mean quickstart?" in refused("quickstart.yaml")
    assert "is a folder" in refused(str(tmp_path))
    assert "'a\\x1b.yaml' does not exist" in refused("a\x1b.yaml")
    assert "--config" in refused("a" * 5000) and "--config" in refused("a\0b") and "--config" in refused("")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mini").mkdir()
    assert config.load("mini").run.name == "mini"
    (tmp_path / "my run.yaml").write_text("train:\n  seed: 5\n")
    assert "run.name = 'my run' is no name for a folder" in refused("my run.yaml")
    assert config.load("my run.yaml", ["run.name=mine"]).run.dir == "runs/mine"


@pytest.mark.parametrize("name", PRESETS)
def test_presets_load_and_are_read_back(name: str, tmp_path: Path) -> None:
    preset = config.load(name)
    assert (preset.run.name, preset.run.dir) == (name, f"runs/{name}")
    file = tmp_path / "config.yaml"
    file.write_text(config.to_yaml(preset), encoding="utf-8")
    assert config.load(str(file)) == preset
    assert config.to_yaml(config.load(str(file))) == config.to_yaml(preset)


def test_every_preset_is_listed_here() -> None:
    assert sorted(PRESETS) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def test_the_default_run() -> None:
    mini = config.load("mini")
    assert (mini.train.batch_tokens, mini.rows_per_step, mini.train.steps) == (131072, 64, None)
    assert mini.model == ModelConfig() and mini.data == config.DataConfig()


def counts(m: ModelConfig) -> tuple[int, int, int, int]:
    """Total without MTP, MTP without its copies, active without embedding and head, active with head.

    The counting formula of DeepSeek-V3's architecture, written down apart from model.py.
    """
    d, heads, q = m.hidden_size, m.num_attention_heads, m.q_lora_rank
    query = heads * m.qk_head_dim
    attention = (d * query if q is None else d * q + q + q * query) + d * (m.kv_lora_rank + m.qk_rope_head_dim)
    attention += (
        m.kv_lora_rank + m.kv_lora_rank * heads * (m.qk_nope_head_dim + m.v_head_dim) + heads * m.v_head_dim * d
    )

    def experts(routed: int) -> int:
        return m.n_routed_experts * d + (routed + m.n_shared_experts) * 3 * d * m.moe_intermediate_size

    def body(routed: int) -> int:
        dense = m.first_k_dense_replace
        ffn = dense * 3 * d * m.intermediate_size + (m.num_hidden_layers - dense) * experts(routed)
        return m.num_hidden_layers * (attention + 2 * d) + ffn + d

    head = m.vocab_size * d
    active = body(m.num_experts_per_tok)
    mtp = attention + experts(m.n_routed_experts) + 2 * d * d + 5 * d
    return body(m.n_routed_experts) + 2 * head, mtp, active, active + head


# Section 2.2 of the reference: total without MTP, MTP, active without embedding and head, active with head.
TABLE = {
    "quickstart": "1.96M 0.83M 0.84M 1.23M",  # smaller than there, for its four minutes on two old cores
    "30m": "30.0M 3.50M 8.59M 14.9M",
    "100m": "107.4M 8.10M 22.9M 48.6M",
    "mini": "531.8M 41.9M 78.2M 116.9M",
    "1b": "1.029B 56.1M 151.0M 202.5M",
    "2b": "2.067B 104.3M 369.6M 434.0M",
    "5b": "4.956B 243M 659M 858M",
    "10b": "9.799B 427M 1.24B 1.51B",
    "16b": "15.71B 593M 2.24B 2.45B",
    "20b": "20.37B 832M 1.72B 1.98B",
    "671b": "671.03B 11.61B 35.70B 36.63B",
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_counts_of_the_table(name: str) -> None:
    for count, text in zip(counts(config.load(name).model), TABLE[name].split(), strict=True):
        unit = {"M": 1e6, "B": 1e9}[text[-1]]
        digits = len(text[:-1].partition(".")[2])
        assert f"{count / unit:.{digits}f}" == text[:-1], count


def test_exact_counts_and_scaling() -> None:
    total, mtp, _, active = counts(config.load("mini").model)
    assert (total, total + mtp) == (531_803_904, 573_718_784)
    total, _, _, active = counts(config.load("671b").model)
    assert total == 671_026_404_352 and round(active / 1e7) == 3663
    for name in PRESETS:
        model = config.load(name).model
        expected = 2.5 if name == "671b" else int(1000 * model.num_experts_per_tok**0.5 + 0.4) / 1000
        assert abs(model.routed_scaling_factor - expected) < 0.004
        assert model.num_nextn_predict_layers == 1 and model.rms_norm_eps == 1e-6
        assert (model.q_lora_rank is None) == (model.num_hidden_layers in (26, 27)), (
            "llama.cpp infers it from the depth"
        )


def test_help_lists_every_key() -> None:
    text = config.describe()
    for key, field in Schema(config.Config).keys.items():
        assert (f"\n{key}: " if "." not in key else f"\n  {key}") in f"\n{text}"
        assert "." not in key or (field.description and field.description in text)
    assert "train.steps = null\n      optimizer steps" in text and "(one of auto, fp32, bf16, fp16)" in text


def test_frozen_and_closed() -> None:
    mini = config.load("mini")
    with pytest.raises(ValidationError):
        mini.train.steps = 3
    with pytest.raises(ValidationError):
        ModelConfig.model_validate({"hidden_sise": 3})


def test_a_mistake_is_told_in_time_and_without_torch() -> None:
    program = """
import sys, time
start = time.process_time()
import config
try:
    config.load("mini", ["train.stpes=5"])
except config.UserError as error:
    print(error)
config.describe()
heavy = {"torch", "numpy", "transformers", "datasets"} & set(sys.modules)
print(heavy or "light", time.process_time() - start)
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    message, verdict = done.stdout.splitlines()
    assert "did you mean train.steps?" in message
    assert verdict.startswith("light ") and float(verdict.split()[1]) < 2, verdict
