"""Hugging Face decoder models: load, cut above a layer, read one layer's activation.

    resid_post   the residual stream after the block                                [B, T, D]
    attn_out     what the block's attention adds to the residual stream            [B, T, D]
    mlp_out      what the block's MLP adds to the residual stream                  [B, T, D]

so that resid_in + attn_out + mlp_out = resid_post. Where a block normalises a branch before adding it
(Gemma 2, OLMo 2, GLM 4), the branch is taken after that norm. Names of modules are only a guess at where
the two branches are; the sum is checked at the first forward pass, so a block that scales a branch
(Granite) or adds the residual inside it (BLOOM) is refused and never read wrongly.

Attention is what transformers itself chooses: sdpa where the architecture has it, else eager. Models that
cap attention logits (Gemma 2) are the exception: sdpa leaves the cap out, which transformers 5.17 lets pass
in silence, so eager is asked for.
Weights are read from safetensors only and no code of a model repository is run.
"""

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as hf_logging

from fastdiff.errors import InputError, OptionError
from fastdiff.rundir import canonical_json, sha256_file, sha256_text
from fastdiff.store.format import TORCH_DTYPES

Hook = Literal["resid_post", "mlp_out", "attn_out"]

# architectures in which no block depends on how many there are: loading the first ones gives the same bits (tested)
_CUT = frozenset({"gemma2", "glm", "gpt2", "gpt_neox", "llama", "mistral", "olmo2", "qwen3"})
# where a cut model says what its list of blocks is called: by its length it is not found any more
_LAYERS = "_fastdiff_layers"
# a branch's own norm comes first: its output is what is added
_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe", "fc2")


@dataclass(frozen=True)
class ModelSource:
    """A model before its weights are loaded."""

    name: str
    config: PreTrainedConfig
    revision: str | None
    saved: torch.dtype  # what its weights were saved in

    @property
    def n_layers(self) -> int:
        """Number of decoder blocks."""
        return int(self.config.num_hidden_layers)

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return int(self.config.hidden_size)


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' warnings, load report and progress bars for a while."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity(logging.CRITICAL)
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def one_line(error: Exception) -> str:
    """A library's message on one line, 300 characters at most."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else text[:297] + "..."


def describe(name_or_path: str) -> ModelSource:
    """Read a model's configuration, not its weights.

    Raises:
        InputError: There is no such directory or id, or it holds no model configuration.
    """
    # owner/name may be an id, but not where a local directory is called like the owner
    looks_local = name_or_path.startswith(("/", ".", "~")) or (
        "/" in name_or_path and Path(name_or_path).parent.is_dir()
    )
    if looks_local and not Path(name_or_path).is_dir():
        raise InputError(f"{name_or_path}: no such directory; a model is a directory or a Hugging Face id")
    try:
        with quiet():
            config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{name_or_path}: not a model directory or a Hugging Face id ({one_line(error)})") from error
    text_config = config.get_text_config(decoder=True)
    for field in ("num_hidden_layers", "hidden_size"):
        if not isinstance(getattr(text_config, field, None), int):
            raise InputError(f"{name_or_path}: its configuration ({config.model_type}) has no {field}")
    saved = getattr(text_config, "dtype", None) or getattr(config, "dtype", None) or _first_dtype(name_or_path)
    return ModelSource(name_or_path, text_config, getattr(config, "_commit_hash", None), saved)


def _first_dtype(name_or_path: str) -> torch.dtype:
    """What a local model's first weight is saved in, where its configuration does not say; else float32."""
    for file in sorted(Path(name_or_path).glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118  it is no dictionary
                    found: torch.dtype = weights.get_tensor(name).dtype
                    if found.is_floating_point:
                        return found
        except (SafetensorError, OSError):
            break  # loading says what is wrong
    return torch.float32


def one_dtype(wanted: str, sources: Sequence[ModelSource], device: torch.device) -> torch.dtype:
    """The precision in which all models run: the same weights, each in the type it was saved in, differ by 0.6 %.

    Args:
        wanted: float32, bfloat16, float16 or auto: bfloat16 on CUDA; elsewhere the widest that a model was saved in,
            for widening loses nothing, but never float16, which CPUs hardly compute in.
        sources: The models.
        device: Where they run.

    Raises:
        OptionError: float16 is wanted of a model that is known to overflow it.
    """
    if wanted == "auto":
        if device.type == "cuda":
            return torch.bfloat16
        widest = functools.reduce(torch.promote_types, [source.saved for source in sources])
        return torch.float32 if widest == torch.float16 else widest
    overflowing = [source.name for source in sources if source.config.model_type.startswith("gemma")]
    if wanted == "float16" and overflowing:
        raise OptionError(f"--dtype float16: the activations of {overflowing[0]} (Gemma) overflow it; use bfloat16")
    return TORCH_DTYPES[wanted]


def weights_sha256(name_or_path: str) -> str | None:
    """Hash of a local model's weights: sha256 over the names and sha256 of its safetensors files.

    Returns:
        Hex digest, or None for a Hugging Face id (its revision says which weights they are).
    """
    if not Path(name_or_path).is_dir():
        return None
    files = sorted(Path(name_or_path).glob("*.safetensors"))
    return sha256_text(canonical_json({file.name: sha256_file(file) for file in files}))


def load(
    name_or_path: str,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str = "cpu",
    *,
    head: bool = False,
    blocks: int | None = None,
) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Args:
        name_or_path: Directory or Hugging Face id.
        dtype: Precision of the weights and the forward pass; "auto" is what the model was saved in.
        device: Where the weights go.
        head: Whether its logits are wanted, so that the weights must have the language modelling head too.
        blocks: How many of the first decoder blocks are wanted. Architectures of which it is known that a block does
            not depend on how many follow get no others, and their weights are not read; the rest is loaded whole.

    Raises:
        InputError: No safetensors weights, damaged ones, or weights that lack a parameter.
    """
    source = describe(name_or_path)
    config = None if blocks is None else _cut(name_or_path, blocks)
    capped = getattr(source.config, "attn_logit_softcapping", None) is not None
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name_or_path,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                attn_implementation="eager" if capped else None,
                output_loading_info=True,
            )
    except SafetensorError as error:
        raise InputError(f"{name_or_path}: damaged safetensors weights ({one_line(error)})") from error
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"{name_or_path}: cannot be loaded from safetensors ({one_line(error)})") from error
    model, report = loaded
    # transformers would fill them with random numbers; a head that is not run may be absent
    inner = {id(parameter) for parameter in model.base_model.parameters()}
    owned = {name for name, parameter in model.named_parameters() if head or id(parameter) in inner}
    missing = sorted(owned & set(report["missing_keys"]))
    if missing:
        raise InputError(f"{name_or_path}: its weights lack {missing[0]} ({len(missing)} parameters in all)")
    return model.eval().requires_grad_(False).to(device)


def _cut(name_or_path: str, blocks: int) -> PreTrainedConfig | None:
    """A model's configuration with its first blocks only; None if the architecture may depend on their number."""
    config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=False)
    n_layers = config.num_hidden_layers if config.model_type in _CUT else 0
    if blocks >= n_layers:
        return None
    for name, value in config.to_dict().items():
        # what each block is, such as layer_types
        if isinstance(value, list) and len(value) == n_layers:
            setattr(config, name, value[:blocks])
    config.num_hidden_layers = blocks
    return config


def find_layers(model: PreTrainedModel) -> tuple[str, nn.ModuleList]:
    """Find the list of decoder blocks: the outermost ModuleList with config.num_hidden_layers entries.

    Returns:
        Its dotted name in `model`, and the list.

    Raises:
        OptionError: There is none, or more than one.
    """
    if (name := getattr(model, _LAYERS, None)) is not None:
        found_before: Any = model.get_submodule(name)
        return name, found_before
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == n_layers
    ]
    depth = min((name.count(".") for name, _ in found), default=0)
    outermost = [(name, module) for name, module in found if name.count(".") == depth]
    if len(outermost) != 1:
        what = " and ".join(name for name, _ in outermost) or "none"
        raise OptionError(
            f"{type(model).__name__}: looked for one list of {n_layers} decoder blocks (num_hidden_layers), "
            f"found {what}"
        )
    return outermost[0]


def layer_index(spec: str, n_layers: int) -> int:
    """Resolve `--layer`: "13" is a 0-based index, "0.5" the fraction min(floor(f * n), n - 1).

    Raises:
        OptionError: Neither, or out of range.
    """
    valid = f"give an index from 0 to {n_layers - 1}, or a fraction from 0.0 to 1.0"
    try:
        if "." in spec:
            fraction = float(spec)
            if 0 <= fraction <= 1:
                return min(int(fraction * n_layers), n_layers - 1)
        elif 0 <= int(spec) < n_layers:
            return int(spec)
    except ValueError as error:
        raise OptionError(f"--layer {spec}: not a number; {valid}") from error
    raise OptionError(f"--layer {spec}: out of range for a model of {n_layers} layers; {valid}")


def truncate(model: PreTrainedModel, layer: int) -> PreTrainedModel:
    """Take the head and every block above `layer` away, so that they are neither run nor kept in memory.

    Args:
        model: Model to cut, changed in place.
        layer: 0-based index of the last block that stays.

    Returns:
        The inner model, without the language modelling head.
    """
    inner: Any = model.base_model
    name, layers = find_layers(inner)
    del layers[layer + 1 :]
    setattr(inner, _LAYERS, name)
    config = inner.config.get_text_config(decoder=True)
    # some architectures run range(num_hidden_layers); those with inputs for each block (Gemma 3n) cut them by it
    if not getattr(config, "hidden_size_per_layer_input", None):
        config.num_hidden_layers = len(layers)
    return inner


class Captured:
    """The activation that the last forward pass left."""

    def __init__(self) -> None:
        self._activation: Tensor | None = None

    def put(self, activation: Tensor) -> None:
        """Keep an activation until it is taken."""
        self._activation = activation

    def shape(self, shape: torch.Size) -> None:
        """Give what is kept the shape of the block's output."""
        if self._activation is not None:
            self._activation = self._activation.reshape(shape)

    def take(self) -> Tensor:
        """Give the activation [B, T, D] of the last forward pass and let go of it."""
        assert self._activation is not None, "no forward pass since the last take"
        activation, self._activation = self._activation, None
        return activation


@contextmanager
def capture(model: PreTrainedModel, layer: int, hook: Hook) -> Iterator[Captured]:
    """Hook a model for as long as the block lasts.

    Args:
        model: A whole or a truncated model.
        layer: 0-based index of the block.
        hook: resid_post, mlp_out or attn_out.

    Yields:
        Where each forward pass puts its activation [B, T, D].

    Raises:
        OptionError: The block has no attention or MLP that adds to the residual stream as expected; raised
            by `capture` itself, or by the first forward pass.
    """
    _, layers = find_layers(model)
    block = layers[layer]
    # the one that attention and MLP read
    stream = getattr(model.config.get_text_config(decoder=True), "altup_active_idx", 0)
    captured = Captured()
    if hook == "resid_post":
        handles = [block.register_forward_hook(lambda _module, _args, out: captured.put(_tensor(out, stream)))]
    else:
        attention, mlp = branches(block)
        handles = _watch_sum(block, attention, mlp, stream)
        target = attention if hook == "attn_out" else mlp
        module = block.get_submodule(target)
        handles.append(module.register_forward_hook(lambda _module, _args, out: captured.put(_tensor(out))))
        # OPT's MLP takes all positions of a batch as one row of vectors
        handles.append(
            block.register_forward_hook(lambda _module, _args, out: captured.shape(_tensor(out, stream).shape))
        )
    try:
        yield captured
    finally:
        for handle in handles:
            handle.remove()


def _tensor(out: Any, stream: int = 0) -> Tensor:
    """The residual stream [B, T, D] of what a module gave; of several [S, B, T, D] (Gemma 3n's AltUp) the one given."""
    tensor: Tensor = out[0] if isinstance(out, tuple) else out
    return tensor[stream] if tensor.dim() == 4 else tensor


def branches(block: nn.Module) -> tuple[str, str]:
    """Names of the modules whose outputs a block adds to its residual stream: attention, MLP."""
    have = {name for name, _ in block.named_children()}
    attention: tuple[str, ...] = _ATTENTION
    mlp: tuple[str, ...] = _MLP
    # post_attention_layernorm is the attention's own only where the MLP has one too; Llama's precedes the MLP
    if "post_feedforward_layernorm" in have:
        attention = ("post_self_attn_layernorm", "post_attention_layernorm", *attention)
        mlp = ("post_feedforward_layernorm", *mlp)
    else:
        attention = ("post_self_attn_layernorm", *attention)
        mlp = ("post_mlp_layernorm", *mlp)
    chosen = []
    for what, names in (("attention", attention), ("MLP", mlp)):
        name = next((name for name in names if name in have), None)
        if name is None:
            raise OptionError(
                f"--hook: {type(block).__name__} has no {what} called {', '.join(names)} "
                f"(it has {', '.join(sorted(have))}); use --hook resid_post"
            )
        chosen.append(name)
    return chosen[0], chosen[1]


def _watch_sum(block: nn.Module, attention: str, mlp: str, stream: int) -> list[Any]:
    """Hooks that check resid_in + attn_out + mlp_out = resid_post in the first forward pass."""
    seen: dict[str, Tensor] = {}
    checked = False

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not checked:
            seen["in"] = _tensor(args[0] if args else kwargs["hidden_states"], stream)

    def branch(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, out: Any) -> None:
            if not checked:
                seen[name] = _tensor(out)

        return hook

    def after(_module: nn.Module, _args: Any, out: Any) -> None:
        nonlocal checked
        if checked:
            return
        checked = True
        parts = [seen.pop(name) for name in ("in", attention, mlp)]
        post = _tensor(out, stream)
        # two additions, each off by half an ulp of a partial sum; 4 leaves room for another order
        epsilon = max(torch.finfo(part.dtype).eps for part in (*parts, post))
        parts64 = [part.double().reshape(post.shape) for part in parts]
        error = (sum(parts64) - post.double()).abs()
        if bool((error > 4 * epsilon * sum(part.abs() for part in parts64)).any()):
            raise OptionError(
                f"--hook: in {type(block).__name__} {attention} and {mlp} do not add up to the change "
                "of the residual stream, so their outputs are not what is added; use --hook resid_post"
            )

    return [
        block.register_forward_pre_hook(before, with_kwargs=True),
        block.get_submodule(attention).register_forward_hook(branch(attention)),
        block.get_submodule(mlp).register_forward_hook(branch(mlp)),
        block.register_forward_hook(after),
    ]
