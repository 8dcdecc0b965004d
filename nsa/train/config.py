"""Training configuration: a YAML file, overridden key by key, checked strictly.

Sections: model, nsa (the fields of `ModelConfig` and `NSAConfig`), data, runtime, train. An unknown or mistyped key
is a ConfigError that names the key, where it was written, and the nearest key that exists.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError, create_model
from pydantic import Field as Limit

from nsa.config import ModelConfig, NSAConfig
from nsa.train.errors import ConfigError


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class DataConfig(Section):
    """dataset       what to train on; `fineweb_edu` streams from the hub, `fineweb_edu_local` from `path`
    path          file, folder or glob; null: the running Python's standard library (text only). A folder of token
                  shards (`python -m nsa.train.prepare`) is read by fineweb_edu_local
    tokenizer     bytes (vocabulary 256), or a tokenizer of the hub or a folder holding a saved one, such as a folder
                  of shards. Shards are ids of their own tokenizer already and do without this key
    workers       processes that tokenise a stream, on each rank; auto: as the cores allow, 1 to 8; 0: none, the rank's
                  own process does. Batches do not depend on it
    text_key      the field of a .jsonl or .parquet record that holds the text
    val_fraction  share of a text dataset held out for validation
    val_docs      documents of a stream held out for validation
    hub_name, hub_subset   the dataset on the hub behind `fineweb_edu`
    """

    dataset: Literal["text", "synthetic", "fineweb_edu", "fineweb_edu_local"] = "text"
    path: str | None = None
    tokenizer: str = "bytes"
    workers: Annotated[int, Limit(ge=0)] | Literal["auto"] = "auto"
    text_key: str = "text"
    val_fraction: float = Limit(0.05, ge=0, lt=1)
    val_docs: int = Limit(256, ge=0)
    hub_name: str = "HuggingFaceFW/fineweb-edu"
    hub_subset: str = "sample-10BT"


def _switch(value: Any) -> Any:
    """YAML 1.1 reads a bare on or off as a boolean."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


class RuntimeConfig(Section):
    """device auto takes CUDA where there is one; precision bf16 is autocast over fp32 weights; ddp as `dist.init`;
    compile auto compiles the blocks on CUDA where that was measured (`nsa.model.compile_blocks`); reduce is the dtype
    in which the ranks exchange gradients.
    """

    device: str = Limit("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)] = "auto"
    gradient_checkpointing: bool = False
    ddp: Literal[-1, 0, 1] = -1
    reduce: Literal["fp32", "bf16"] = "fp32"


class LoopConfig(Section):
    """Counts are optimizer steps. `batch_size` windows of `seq_len` tokens make one micro-batch over all ranks;
    `accumulate_grad_batches` of them make a step. Cosine ends at `min_lr_ratio` * lr on the last of `steps`.
    0 switches eval_every, save_every (then only the end saves) and grad_clip off.
    """

    steps: int = Limit(200, ge=1)
    seq_len: int = Limit(256, ge=1)
    batch_size: int = Limit(8, ge=1)
    accumulate_grad_batches: int = Limit(1, ge=1)
    lr: float = Limit(3e-4, gt=0)
    lr_schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Limit(0, ge=0)
    min_lr_ratio: float = Limit(0.1, ge=0, le=1)
    weight_decay: float = Limit(0.01, ge=0)
    beta1: float = Limit(0.9, ge=0, lt=1)
    beta2: float = Limit(0.95, ge=0, lt=1)
    grad_clip: float = Limit(1.0, ge=0)
    seed: int = Limit(1337, ge=0)
    log_every: int = Limit(20, ge=1)
    eval_every: int = Limit(0, ge=0)
    eval_batches: int = Limit(8, ge=1)
    save_every: int = Limit(0, ge=0)
    out_dir: str = Limit("artifacts/train", min_length=1)
    resume: str | None = None
    save: str | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run is made of; `model.nsa` is the nsa section."""

    model: ModelConfig
    data: DataConfig
    runtime: RuntimeConfig
    train: LoopConfig

    def as_dict(self) -> dict[str, dict[str, Any]]:
        """The sections as plain values, as a YAML file would hold them."""
        model = asdict(self.model)
        sparse = model.pop("nsa")
        rest = {name: getattr(self, name).model_dump() for name in ("data", "runtime", "train")}
        return {"model": model, "nsa": sparse, **rest}


class Override(NamedTuple):
    """A value that replaces the file's: `source` is the flag as the user typed it, for error messages."""

    source: str
    key: str
    value: Any


def _section_of(cls: type, *, leave_out: str = "") -> type[BaseModel]:
    """The strict form of a plain dataclass, so that its fields and defaults are written once."""
    hints = get_type_hints(cls)
    members: dict[str, Any] = {f.name: (hints[f.name], f.default) for f in fields(cls) if f.name != leave_out}
    return create_model(cls.__name__, __base__=Section, **members)


_SECTIONS: dict[str, type[BaseModel]] = {
    "model": _section_of(ModelConfig, leave_out="nsa"),
    "nsa": _section_of(NSAConfig),
    "data": DataConfig,
    "runtime": RuntimeConfig,
    "train": LoopConfig,
}
_KEYS = [f"{section}.{key}" for section, schema in _SECTIONS.items() for key in schema.model_fields]


class _Loader(yaml.SafeLoader):
    """YAML that reads 3e-4 as a number (YAML 1.1 wants 3.0e-4) and refuses a key written twice."""


def _mapping(loader: _Loader, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
    seen = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node, deep=True)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} is written twice", key_node.start_mark)
        seen.add(key)
    return yaml.SafeLoader.construct_mapping(loader, node, deep)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def _parse(text: str, source: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise ConfigError(f"{source}{line}: {error.problem or error.context}; mend the YAML there") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not readable as YAML: {str(error).splitlines()[0]}") from error


def parse_set(assignment: str) -> Override:
    """`train.lr=1e-3`, as given to --set, with a YAML value."""
    key, equals, value = assignment.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"--set {assignment}: write --set section.key=value, for example --set train.steps=100")
    return Override("--set", key.strip(), _parse(value, f"--set {key.strip()}"))


def _unknown(key: str, source: str) -> ConfigError:
    name = key.rpartition(".")[2]
    same_name = [known for known in _KEYS if known.rpartition(".")[2] == name]
    near = same_name or difflib.get_close_matches(key, _KEYS, n=1) or difflib.get_close_matches(key, _SECTIONS, n=1)
    hint = f"did you mean {near[0]}?" if near else f"sections are {', '.join(_SECTIONS)}"
    return ConfigError(f"{source}: unknown key {key}; {hint}")


def _read(path: Path) -> dict[str, dict[str, Any]]:
    """The file's sections; every key in it exists."""
    if path.is_dir():
        raise ConfigError(f"{path}: is a directory; name a YAML file in it (CONFIG=...)")
    if not path.is_file():
        raise ConfigError(f"{path}: no such config file; set CONFIG to one, such as configs/train_showcase.yaml")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as text: {error}") from error
    raw = _parse(text, str(path)) or {}
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: holds {type(raw).__name__}, not sections; sections are {', '.join(_SECTIONS)}")
    sections: dict[str, dict[str, Any]] = {}
    for section, values in raw.items():
        if section not in _SECTIONS:
            raise _unknown(str(section), str(path))
        if not isinstance(values, dict | None):
            raise ConfigError(f"{path}: {section} = {values!r}: must be a section with keys under it")
        sections[section] = dict(values or {})
        for key in sections[section]:
            if f"{section}.{key}" not in _KEYS:
                raise _unknown(f"{section}.{key}", str(path))
    return sections


def load(path: str | Path, overrides: Iterable[Override] = ()) -> TrainConfig:
    """Read a YAML file, apply overrides in order, check everything. Raises ConfigError."""
    path = Path(path)
    sections = _read(path)
    sources: dict[str, str] = {}
    for source, key, value in overrides:
        if key not in _KEYS:
            raise _unknown(key, source)
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
        sources[key] = source
    return build(sections, str(path), sources)


def build(
    sections: Mapping[str, Mapping[str, Any]], source: str = "config", sources: Mapping[str, str] | None = None
) -> TrainConfig:
    """A TrainConfig from plain sections. `source` names where they came from, `sources` a key's own origin."""
    for section, values in sections.items():
        for key in values:
            if f"{section}.{key}" not in _KEYS:
                raise _unknown(f"{section}.{key}", source)
    checked: dict[str, Any] = {}
    for section, schema in _SECTIONS.items():
        try:
            checked[section] = schema.model_validate(dict(sections.get(section, {})))
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join([section, *map(str, first["loc"][:1])])
            where = (sources or {}).get(key, source)
            raise ConfigError(f"{where}: {key} = {first['input']!r}: {first['msg'].lower()}") from error
    try:
        nsa = NSAConfig(**checked["nsa"].model_dump())
        model = ModelConfig(**checked["model"].model_dump(), nsa=nsa)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from error
    return TrainConfig(model, checked["data"], checked["runtime"], checked["train"])
