"""The configuration is strict: what it does not know, it names; what it knows, it builds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nsa.blocks import n_selection
from nsa.cache import KVCache
from nsa.model import Transformer
from nsa.train import config
from nsa.train.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
SHOWCASE, M7C = ROOT / "configs/train_showcase.yaml", ROOT / "configs/m7c_125m.yaml"


def test_the_125m_config_builds_its_model():
    cfg = config.load(M7C)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Transformer(cfg.model).parameters())
    assert abs(parameters / 123.9e6 - 1) < 0.01, parameters
    assert (cfg.model.dim, cfg.model.n_layers, cfg.model.n_heads, cfg.model.hidden_dim) == (768, 12, 12, 2304)
    sparse = cfg.model.nsa
    assert (sparse.l, sparse.d, sparse.l_sel, sparse.n_sel, sparse.w) == (32, 16, 64, 16, 512)
    assert (cfg.data.tokenizer, cfg.runtime.precision, cfg.train.seq_len) == ("gpt2", "bf16", 4096)


def test_the_showcase_config_is_the_one_that_users_know():
    cfg = config.load(SHOWCASE)
    assert (cfg.model.dim, cfg.model.n_heads, cfg.model.n_kv_groups, cfg.model.d_k, cfg.model.d_v) == (
        128,
        8,
        2,
        16,
        16,
    )
    sparse = cfg.model.nsa
    assert (sparse.l, sparse.d, sparse.l_sel, sparse.n_sel, sparse.w, sparse.phi) == (16, 8, 32, 4, 64, "avg")
    train = cfg.train
    assert (train.steps, train.seq_len, train.batch_size, train.lr, train.seed) == (200, 256, 8, 3e-4, 1337)
    assert (train.log_every, train.out_dir, cfg.data.dataset) == (20, "artifacts/train_showcase", "text")


def test_the_showcase_trains_on_fewer_blocks_than_there_are():
    """Measured: what the selected branch reads over a training window is below what causal attention reads."""
    cfg = config.load(SHOWCASE)
    T = cfg.train.seq_len
    assert cfg.model.nsa.n_sel < n_selection(T, cfg.model.nsa)
    torch.manual_seed(0)
    cache = KVCache(cfg.model, 1, T, device=torch.device("cpu"), dtype=torch.float32)
    Transformer(cfg.model)(torch.randint(0, 256, (1, T)), cache)
    causal = T * (T + 1) // 2
    selected = torch.as_tensor(cache.reads().sel)
    assert (selected < 0.75 * causal).all(), (selected, causal)


@pytest.mark.parametrize(
    ("assignment", "named"),
    [
        ("train.batchsize=4", "train.batch_size"),
        ("n_sel=4", "nsa.n_sel"),
        ("train.steps=many", "train.steps"),
        ("train.steps=2.5", "train.steps"),
        ("train.steps=0", "train.steps"),
        ("train.steps='3'", "train.steps = '3'"),
        ("runtime.gradient_checkpointing=1", "runtime.gradient_checkpointing"),
        ("train.lr=.nan", "train.lr"),
        ("data.dataset=wiki", "data.dataset"),
        ("nsa.l=15", "nsa.l = 15"),
        ("nsa.n_sel=2", "nsa.n_sel = 2"),
        ("model.n_kv_groups=3", "model.n_heads = 8"),
        ("runtime.device=tpu", "runtime.device"),
        ("train.lr", "train.lr"),
        ("train.lr=[", "train.lr"),
    ],
)
def test_a_wrong_override_is_named(assignment, named):
    with pytest.raises(ConfigError) as error:
        config.load(SHOWCASE, [config.parse_set(assignment)])
    message = str(error.value)
    assert named in message
    assert len(message.splitlines()) <= 2


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("train: {steps: 1, step_size: 3}", "train.step_size"),
        ("trian: {steps: 1}", "trian"),
        ("train: {steps: 1, steps: 2}", "'steps' is written twice"),
        ("model: {nsa: {l: 16}}", "model.nsa"),
        ("train: 3", "train = 3"),
        ("- a\n- b", "list"),
        ("train: {steps: [1", "c.yaml:"),
        ("train: {lr: 'fast'}", "train.lr = 'fast'"),
    ],
)
def test_a_wrong_file_is_named(tmp_path, text, named):
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as error:
        config.load(path)
    assert named in str(error.value)
    assert "c.yaml" in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"gone\.yaml: no such config file"):
        config.load(tmp_path / "gone.yaml")
    with pytest.raises(ConfigError, match="is a directory"):
        config.load(tmp_path)


def test_the_message_names_the_nearest_key_and_the_origin():
    with pytest.raises(ConfigError, match=r"--set: unknown key train\.warmup_step; did you mean train\.warmup_steps\?"):
        config.load(SHOWCASE, [config.parse_set("train.warmup_step=3")])
    with pytest.raises(ConfigError, match=r"--steps: train\.steps = -1"):
        config.load(SHOWCASE, [config.Override("--steps", "train.steps", -1)])


def test_later_overrides_win_and_exponents_are_numbers(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("train: {lr: 3e-4, steps: 7}\nmodel:\n")
    cfg = config.load(path, [config.parse_set("train.steps=8"), config.Override("--steps", "train.steps", 9)])
    assert (cfg.train.lr, cfg.train.steps) == (3e-4, 9)


def test_as_dict_builds_the_same_config():
    cfg = config.load(M7C)
    assert config.build(cfg.as_dict()) == cfg


@pytest.mark.parametrize(
    ("written", "meant"), [("auto", "auto"), ("on", "on"), ("off", "off"), ("true", "on"), ("false", "off")]
)
def test_compile_is_auto_on_or_off_and_yamls_booleans_are_on_and_off(written, meant):
    assert config.load(SHOWCASE, [config.parse_set(f"runtime.compile={written}")]).runtime.compile == meant
    assert config.load(SHOWCASE).runtime.compile == "auto"


def test_compile_is_nothing_else():
    with pytest.raises(ConfigError, match=r"--set: runtime.compile = 'maybe': input should be 'auto', 'on' or 'off'"):
        config.load(SHOWCASE, [config.parse_set("runtime.compile=maybe")])


def test_the_dense_twin_takes_the_125m_config_and_refuses_a_pattern():
    dense = config.parse_set("model.attention=dense")
    assert config.load(M7C, [dense]).model.attention == "dense"
    with pytest.raises(ConfigError, match=r"train_showcase.yaml: nsa.l = 16: model.attention = dense has no sparse"):
        config.load(SHOWCASE, [dense])
    with pytest.raises(ConfigError, match=r"model\.attention = 'flash'"):
        config.load(SHOWCASE, [config.parse_set("model.attention=flash")])
