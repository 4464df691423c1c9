import json
import re
import shutil
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    Gemma3nTextConfig,
    GlmConfig,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    OPTConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.utils import logging as hf_logging

from fastdiff.errors import InputError, OptionError
from fastdiff.extraction.models import (
    ModelSource,
    capture,
    describe,
    find_layers,
    layer_index,
    load,
    one_dtype,
    quiet,
    truncate,
    weights_sha256,
)

N_LAYERS = 3
_SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_GROUPED = {**_SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    # a window shorter than the batch, so that both kinds of its attention mask matter
    "gemma2": lambda: Gemma2Config(**_GROUPED, sliding_window=6, max_position_embeddings=64),
    "llama": lambda: LlamaConfig(**_GROUPED),
    "gpt2": lambda: GPT2Config(
        vocab_size=60, n_embd=32, n_layer=N_LAYERS, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2
    ),
}
OTHERS = {
    "mistral": lambda: MistralConfig(**_GROUPED),
    "qwen3": lambda: Qwen3Config(**_GROUPED),
    "neox": lambda: GPTNeoXConfig(**_SIZES, intermediate_size=48),
    "olmo2": lambda: Olmo2Config(**{**_SIZES, "intermediate_size": 48}),
    "glm": lambda: GlmConfig(**_GROUPED),
}
ARCHITECTURES = list(CONFIGS)


def make(config, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    with quiet():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                # away from the small and the all-one values of the initialisation, which hide mistakes
                parameter.add_(0.1 * torch.randn_like(parameter))
        model.to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: make(config(), root / name) for name, config in (CONFIGS | OTHERS).items()}


@pytest.fixture(scope="module")
def batch() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 60, (3, 14), generator=generator)
    mask = torch.ones_like(ids)
    mask[0, 9:], mask[2, 4:] = 0, 0
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def full(path: Path) -> PreTrainedModel:
    # transformers 5.17 runs Gemma 2 with sdpa, which leaves its attention cap out
    attention = "eager" if path.name == "gemma2" else None
    with quiet():
        return AutoModelForCausalLM.from_pretrained(path, attn_implementation=attention).eval()


@torch.inference_mode()
def extracted(path: Path, batch: dict[str, Tensor], layer: int, hook: str) -> Tensor:
    model = truncate(load(str(path)), layer)
    with capture(model, layer, hook) as captured:
        model(**batch, use_cache=False)
        return captured.take()


@torch.inference_mode()
def outputs_of(model: PreTrainedModel, modules: dict[str, nn.Module], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, module in modules.items():
        module.register_forward_hook(
            lambda _module, _args, out, name=name: found.__setitem__(name, out[0] if isinstance(out, tuple) else out)
        )
    model(**batch)
    return found


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_resid_post_equals_hidden_states_of_the_full_model_bit_for_bit(paths, batch, name) -> None:
    with torch.inference_mode():
        states = full(paths[name])(**batch, output_hidden_states=True).hidden_states
    for layer in range(N_LAYERS - 1):
        assert torch.equal(extracted(paths[name], batch, layer, "resid_post"), states[layer + 1])


@torch.inference_mode()
@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_a_model_of_which_only_the_first_blocks_are_read_gives_the_same_bits(paths, batch, tmp_path, name) -> None:
    # what lies above is not there at all
    shutil.copytree(paths[name], tmp_path / name)
    weights = load_file(tmp_path / name / "model.safetensors")
    for layer in range(N_LAYERS - 1):
        above = re.compile(rf"\.({'|'.join(str(i) for i in range(layer + 1, N_LAYERS))})\.")
        save_file(
            {key: value for key, value in weights.items() if not above.search(key)},
            tmp_path / name / "model.safetensors",
            {"format": "pt"},
        )
        whole, first = (
            truncate(load(str(paths[name])), layer),
            truncate(load(str(tmp_path / name), blocks=layer + 1), layer),
        )
        assert sum(p.numel() for p in whole.parameters()) == sum(p.numel() for p in first.parameters())
        got = []
        for model in (whole, first):
            with capture(model, layer, "resid_post") as captured:
                model(**batch, use_cache=False)
                got.append(captured.take())
        assert torch.equal(*got)


@torch.inference_mode()
@pytest.mark.parametrize("layer", range(N_LAYERS))
def test_inputs_for_each_block_are_not_cut_with_the_blocks(tmp_path, batch, layer) -> None:
    # Gemma 3n: a traceback below the last layer, and at layer 0 two lists of one block
    config = Gemma3nTextConfig(
        **_GROUPED, vocab_size_per_layer_input=60, hidden_size_per_layer_input=8, laurel_rank=4, num_kv_shared_layers=0,
        sliding_window=16, layer_types=["sliding_attention"] * 2 + ["full_attention"], altup_num_inputs=2,
        activation_sparsity_pattern=[0.0] * N_LAYERS, max_position_embeddings=64,
    )  # fmt: skip
    path = make(config, tmp_path / "gemma3n")
    whole, seen = full(path), {}
    _, layers = find_layers(whole)
    hook = layers[layer].register_forward_hook(lambda _module, _args, out: seen.update(out=out))
    whole(**batch)
    hook.remove()
    model = truncate(load(str(path), blocks=layer + 1), layer)
    with capture(model, layer, "resid_post") as captured:
        model(**batch, use_cache=False)
        # of the streams that AltUp keeps, the one that attention and MLP read
        assert torch.equal(captured.take(), seen["out"][config.altup_active_idx])
    with capture(model, layer, "mlp_out"), pytest.raises(OptionError, match="resid_post"):
        model(**batch, use_cache=False)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_resid_post_of_the_last_layer_equals_a_hook_on_the_full_model(paths, batch, name) -> None:
    model = full(paths[name])
    blocks = model.transformer.h if name == "gpt2" else model.model.layers
    want = outputs_of(model, {"out": blocks[-1]}, batch)["out"]
    assert torch.equal(extracted(paths[name], batch, N_LAYERS - 1, "resid_post"), want)


ADDED = {
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "llama": ("self_attn", "mlp"),
    # the last step of each branch, which the modules attn and mlp end with
    "gpt2": ("attn.resid_dropout", "mlp.dropout"),
}


@pytest.mark.parametrize("layer", [0, N_LAYERS - 1])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_attn_out_and_mlp_out_equal_hooks_on_the_full_model(paths, batch, name, layer) -> None:
    model = full(paths[name])
    block = (model.transformer.h if name == "gpt2" else model.model.layers)[layer]
    modules = dict(zip(("attn_out", "mlp_out"), map(block.get_submodule, ADDED[name]), strict=True))
    for hook, want in outputs_of(model, modules, batch).items():
        assert torch.equal(extracted(paths[name], batch, layer, hook), want)


def test_a_branch_that_takes_all_positions_as_rows_has_the_shape_of_the_stream(tmp_path, batch) -> None:
    # OPT's MLP: a traceback once
    path = make(OPTConfig(**_SIZES, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=64), tmp_path / "opt")
    model = full(path)
    want = outputs_of(model, {"mlp": model.model.decoder.layers[1].fc2}, batch)["mlp"]
    got = extracted(path, batch, 1, "mlp_out")
    assert got.shape == (*batch["input_ids"].shape, 32) and torch.equal(got.reshape(want.shape), want)


@pytest.mark.parametrize("name", [*ARCHITECTURES, *OTHERS])
def test_residual_before_plus_attention_plus_mlp_is_the_residual_after(paths, batch, name) -> None:
    model = truncate(load(str(paths[name])), 1)
    with ExitStack() as stack, torch.inference_mode():
        hooks = [(0, "resid_post"), (1, "attn_out"), (1, "mlp_out"), (1, "resid_post")]
        captured = [stack.enter_context(capture(model, *hook)) for hook in hooks]
        model(**batch, use_cache=False)
        before, attention, mlp, after = (each.take().double() for each in captured)
    torch.testing.assert_close(before + attention + mlp, after, rtol=0, atol=2e-6)
    # neither part is small enough for the sum to hold without it
    assert min(attention.abs().mean(), mlp.abs().mean()) > 1e-3


@pytest.mark.parametrize("config", [GraniteConfig, BloomConfig])
def test_block_whose_branches_are_not_what_is_added_is_refused_for_branches_only(tmp_path, batch, config) -> None:
    sizes = dict(_GROUPED, residual_multiplier=0.5) if config is GraniteConfig else {"vocab_size": 60}
    if config is BloomConfig:
        sizes |= {"hidden_size": 32, "n_layer": N_LAYERS, "n_head": 4}
    path = make(config(**sizes), tmp_path / "model")
    with pytest.raises(OptionError, match="do not add up to the change of the residual stream"):
        extracted(path, batch, 1, "mlp_out")
    assert extracted(path, batch, 1, "resid_post").shape == (3, 14, 32)


def test_block_without_a_known_mlp_is_refused_with_the_names_looked_for(paths) -> None:
    model = load(str(paths["llama"]))
    block = find_layers(model)[1][0]
    block.channel_mixer = block.mlp
    del block.mlp
    message = r"no MLP called .*mlp.*feed_forward.*it has .*channel_mixer"
    with pytest.raises(OptionError, match=message), capture(model, 0, "mlp_out"):
        pass


def test_hooks_are_gone_after_the_block(paths, batch) -> None:
    model = truncate(load(str(paths["llama"])), 1)
    with capture(model, 1, "attn_out"):
        pass
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_truncation_frees_head_and_upper_layers_and_does_not_run_them(paths, batch, name) -> None:
    whole = load(str(paths[name]))
    layers = find_layers(whole)[1]
    upper = sum(p.numel() for block in list(layers)[1:] for p in block.parameters())
    calls: list[int] = []
    for index, block in enumerate(layers):
        block.register_forward_hook(lambda _module, _args, _out, index=index: calls.append(index))
    inner_before = sum(p.numel() for p in whole.base_model.parameters())
    cut = truncate(whole, 0)
    assert sum(p.numel() for p in cut.parameters()) == inner_before - upper
    assert not hasattr(cut, "lm_head")
    cut(**batch, use_cache=False)
    assert calls == [0]


@pytest.mark.parametrize(
    ("name", "where"),
    [
        ("llama", "model.layers"),
        ("gemma2", "model.layers"),
        ("gpt2", "transformer.h"),
        ("neox", "gpt_neox.layers"),
    ],
)
def test_block_list_is_found(paths, name, where) -> None:
    assert find_layers(load(str(paths[name])))[0] == where


def test_two_block_lists_of_the_same_length_are_refused_by_name(paths) -> None:
    model = load(str(paths["llama"]))
    model.model.others = nn.ModuleList(nn.Identity() for _ in range(N_LAYERS))
    with pytest.raises(OptionError, match=r"found model\.layers and model\.others"):
        find_layers(model)


@pytest.mark.parametrize(
    ("spec", "n", "want"),
    [
        ("0", 26, 0),
        ("25", 26, 25),
        ("0.5", 26, 13),
        ("0.5", 3, 1),
        ("0.0", 3, 0),
        ("1.0", 3, 2),
        ("0.999", 12, 11),
    ],
)
def test_layer_is_an_index_or_a_fraction(spec, n, want) -> None:
    assert layer_index(spec, n) == want


@pytest.mark.parametrize("spec", ["26", "-1", "1.5", "-0.1", "half", "nan.", ""])
def test_layer_out_of_range_names_the_range(spec) -> None:
    with pytest.raises(OptionError, match=r"from 0 to 25"):
        layer_index(spec, 26)


def test_gemma2_keeps_its_attention_cap(paths, batch) -> None:
    model = load(str(paths["gemma2"]))
    assert model.config._attn_implementation == "eager"


def test_weights_that_lack_a_parameter_are_refused(paths, tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    source, target = paths["llama"], tmp_path / "broken"
    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    weights = load_file(source / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load(str(target))


def test_missing_language_model_head_does_not_matter(paths, batch, tmp_path) -> None:
    with quiet():
        full(paths["llama"]).model.save_pretrained(tmp_path / "headless")
    want = extracted(paths["llama"], batch, 1, "resid_post")
    assert torch.equal(extracted(tmp_path / "headless", batch, 1, "resid_post"), want)


def test_pickled_weights_are_not_read(paths, tmp_path) -> None:
    target = tmp_path / "pickled"
    target.mkdir()
    (target / "config.json").write_bytes((paths["llama"] / "config.json").read_bytes())
    torch.save(full(paths["llama"]).state_dict(), target / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load(str(target))


def test_damaged_weights_are_refused(paths, tmp_path) -> None:
    target = tmp_path / "damaged"
    target.mkdir()
    (target / "config.json").write_bytes((paths["llama"] / "config.json").read_bytes())
    (target / "model.safetensors").write_bytes((paths["llama"] / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(InputError, match=re.escape(str(target))):
        load(str(target))


def test_code_of_a_model_repository_is_not_run(tmp_path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "evil.C", "AutoModelForCausalLM": "evil.M"}}'
    )
    (tmp_path / "evil.py").write_text("raise SystemExit('ran')")
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        describe(str(tmp_path))


def test_missing_model_directory_is_named(tmp_path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        describe(str(tmp_path / "absent"))


def test_directory_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match=re.escape(str(tmp_path))):
        describe(str(tmp_path))


def test_dtype_is_that_of_the_model_or_the_one_asked_for(tmp_path) -> None:
    path = make(CONFIGS["llama"](), tmp_path / "bf16", torch.bfloat16)
    assert load(str(path)).dtype == torch.bfloat16
    assert load(str(path), torch.float32).dtype == torch.float32


CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("saved", "device", "wanted", "dtype"),
    [
        ((torch.bfloat16, torch.bfloat16), CPU, "auto", torch.bfloat16),
        ((torch.bfloat16, torch.float32), CPU, "auto", torch.float32),
        # neither holds the other's digits
        ((torch.bfloat16, torch.float16), CPU, "auto", torch.float32),
        ((torch.float16, torch.float16), CPU, "auto", torch.float32),
        ((torch.float32, torch.float32), CUDA, "auto", torch.bfloat16),
        ((torch.float32, torch.bfloat16), CUDA, "float32", torch.float32),
        ((torch.float32, torch.bfloat16), CPU, "float16", torch.float16),
    ],
)
def test_all_models_run_in_one_precision(saved, device, wanted, dtype) -> None:
    sources = [ModelSource(f"m{i}", CONFIGS["llama"](), None, one) for i, one in enumerate(saved)]
    assert one_dtype(wanted, sources, device) == dtype


def test_float16_is_refused_where_it_overflows() -> None:
    sources = [ModelSource(kind, CONFIGS[kind](), None, torch.bfloat16) for kind in ("llama", "gemma2")]
    with pytest.raises(OptionError, match=r"gemma2 .* use bfloat16"):
        one_dtype("float16", sources, CUDA)


def test_what_weights_were_saved_in_is_known_without_the_configuration(tmp_path) -> None:
    path = make(CONFIGS["llama"](), tmp_path / "bf16", torch.bfloat16)
    assert describe(str(path)).saved == torch.bfloat16
    config = json.loads((path / "config.json").read_text())
    config = {name: value for name, value in config.items() if name not in ("dtype", "torch_dtype")}
    (path / "config.json").write_text(json.dumps(config))
    assert describe(str(path)).saved == torch.bfloat16


def test_loading_is_silent_and_restores_verbosity(paths, capfd) -> None:
    before = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    load(str(paths["llama"]))
    assert capfd.readouterr() == ("", "")
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == before


def test_weights_hash_follows_the_weights(paths, tmp_path) -> None:
    again = make(CONFIGS["llama"](), tmp_path / "again")
    assert weights_sha256(str(again)) == weights_sha256(str(paths["llama"]))
    assert weights_sha256(str(paths["gpt2"])) != weights_sha256(str(paths["llama"]))
    assert weights_sha256("org/model") is None
