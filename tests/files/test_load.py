"""Loading: what a folder or GGUF file must hold, in which format it runs, and what is said when something is wrong."""

import json

import numpy as np
import pytest
from support import gguf_files
from support.folders import CONFIGS, ids, random_weights, write_folder, write_gguf
from support.synthetic import config_json

import minigemma as mg
from minigemma.arrays import LargePages
from minigemma.files.convert import (
    EIGHT_BITS,
    FORMATS,
    RUNS_AS,
    Stored,
    converted_weight,
    held_bytes,
    in_mostly_other_bits,
    runs_as,
    stored_tensor,
)
from minigemma.files.gguf_file import open_gguf
from minigemma.files.load import describe
from minigemma.layouts import LAYOUTS, Weight
from minigemma.layouts import STORED as STORED_FORMS
from minigemma.layouts.gguf_blocks import Q4_0, dequantize, quantize_blocks
from minigemma.layouts.int4 import to_gguf
from minigemma.models.registry import RELEASED, all_names, layer_tensors


@pytest.mark.parametrize("family", CONFIGS)
def test_a_gguf_file_is_the_same_model_as_the_folder_it_was_made_from(family, tmp_path):
    """Norms hold 1 + w there; applied twice, or not at all, the logits would have nothing in common."""
    config, weights = CONFIGS[family], random_weights(CONFIGS[family])
    folder = mg.load(write_folder(tmp_path / "hf", config, weights))
    file = mg.load(write_gguf(tmp_path / "model.gguf", config, weights))
    assert file.config == folder.config
    np.testing.assert_allclose(file.forward(ids), folder.forward(ids), atol=2e-4 * np.abs(folder.forward(ids)).max())


STORED = {"F32": "f32", "F16": "bf16", "BF16": "bf16", "Q8_0": "int8", "Q5_0": "int8", "Q5_1": "int8"}
STORED |= {"Q4_0": "int4-symmetric", "Q4_1": "int4"}


@pytest.mark.parametrize("kind", STORED)
def test_gguf_types_run_in_the_nearest_layout(kind, tmp_path):
    config, weights = CONFIGS["gemma3"], random_weights(CONFIGS["gemma3"])
    model = mg.load(write_gguf(tmp_path / "model.gguf", config, weights, kind))
    matrix = model.weights.blocks[3].ffn.down
    assert matrix.layout.name == STORED[kind]
    assert not matrix.data.flags.writeable
    exact = mg.load(tmp_path / "model.gguf", dtype="f32").weights.blocks[3].ffn.down.data
    assert np.abs(matrix.widen() - exact).max() <= (np.abs(exact).max() / 200 if kind in ("F16", "Q5_1") else 0)
    in_place = kind in ("F32", "BF16", "Q8_0")  # Q4_0 and Q4_1 are interleaved while loading
    assert in_place == _in_mapping(matrix.data)


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "TQ1_0", "TQ2_0", "IQ4_NL", "IQ4_XS"])
def test_a_type_without_kernels_of_its_own_runs_as_int8(kind, tmp_path, monkeypatch):
    plain = gguf_files.quantize

    def quantize(values, wanted):
        if wanted != kind:
            return plain(values, wanted)
        columns = values.shape[1] // gguf_files.KINDS[kind][1]
        return gguf_files.random_blocks(kind, len(values), columns).reshape(len(values), -1)

    monkeypatch.setattr(gguf_files, "quantize", quantize)
    config = CONFIGS["gemma3"]
    path = write_gguf(tmp_path / "model.gguf", config, random_weights(config), kind)
    model, exact = mg.load(path), mg.load(path, dtype="f32")
    matrix, right = model.weights.blocks[3].ffn.down, exact.weights.blocks[3].ffn.down.data
    off = np.abs(matrix.widen() - right.reshape(matrix.shape)).max()
    assert matrix.layout.name == "int8" and off <= (0 if kind in gguf_files.LOSSLESS else np.abs(right).max() / 190)
    assert np.isfinite(model.forward(ids)).all()


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_four_bits_are_interleaved_whether_int4_is_named_or_not(kind, tmp_path):
    """The same weights, in the order that is fastest, and no byte more in memory."""
    config, weights = CONFIGS["gemma3"], random_weights(CONFIGS["gemma3"])
    path = write_gguf(tmp_path / "model.gguf", config, weights, kind)
    stored, asked = mg.load(path), mg.load(path, dtype="int4")
    one, other = stored.weights.blocks[3].ffn.down, asked.weights.blocks[3].ffn.down
    assert np.array_equal(one.data, other.data) and np.array_equal(to_gguf(one.data), _blocks_of(path, one.data))
    assert asked.weights.embedding.layout.name == stored.weights.embedding.layout.name == STORED[kind]
    np.testing.assert_array_equal(asked.forward(ids), stored.forward(ids))


def _blocks_of(path, data):
    """The tensor of a GGUF file with as many bytes, row by row, as these have."""
    name = "blk.3.ffn_down.weight"
    blocks = open_gguf(path).tensors[name].blocks
    assert blocks.nbytes == data.nbytes
    return blocks


def test_int4_of_rows_that_do_not_divide_by_sixteen_runs_as_int8():
    """From Q4_0 blocks losslessly."""
    x = np.random.default_rng(0).standard_normal((19, 96), np.float32)
    blocks = quantize_blocks(x.reshape(-1, 32), Q4_0).reshape(19, 3, 18)
    for kind, array in (("Q4_0", blocks), ("F32", x)):
        tensor = Stored("up", kind, (19, 96), array)
        weight, wide = converted_weight("blocks.0.ffn.down", tensor, "int4", 0.0, LargePages()), dequantize(kind, array)
        assert weight.layout.name == "int8"
        assert np.abs(weight.widen() - wide).max() <= (0 if kind == "Q4_0" else np.abs(wide).max() / 250)
        assert held_bytes("blocks.0.ffn.down", tensor, "int4") == weight.nbytes


def test_q4_k_takes_five_bits_and_is_its_own_exact_model(tmp_path, monkeypatch):
    """Rounding products of scales to float16, and x to 8 bits, hardly moves a distribution; `describe` says so."""
    plain = gguf_files.quantize

    def quantize(values, wanted):
        if wanted != "Q4_K" or values.shape[1] % 256:
            return plain(values, "Q8_0" if wanted == "Q4_K" else wanted)
        made = gguf_files.random_blocks("Q4_K", len(values), values.shape[1] // 256).copy()
        made[..., :4] = np.array([3e-4, 2.2e-3], np.float16).view(np.uint8)  # 6-bit scales: weights around 0
        return made.reshape(len(values), -1)

    monkeypatch.setattr(gguf_files, "quantize", quantize)
    config = CONFIGS["gemma2"]
    path = write_gguf(tmp_path / "model.gguf", config, random_weights(config), "Q4_K")
    model, exact = mg.load(path), mg.load(path, dtype="f32")
    gate = model.weights.blocks[0].ffn.gate
    assert gate.layout.name == "int4" and gate.nbytes == gate.shape[0] * gate.shape[1] * 5 // 8
    wide = exact.weights.blocks[0].ffn.gate.data
    assert np.abs(gate.widen() - wide).max() < 2**-10 * np.abs(wide).max()
    assert describe(path).held["blocks.0.ffn.gate"] == ("int4", gate.nbytes)
    logits = [np.float64(each.forward(ids)) for each in (model, exact)]
    q, p = (each - np.log(np.exp(each).sum(axis=-1, keepdims=True)) for each in logits)
    assert (np.exp(p) * (p - q)).sum(axis=-1).mean() < 0.002


def test_27b_in_q4_k_m_fits_into_24_gb():
    """llama.cpp's mix: half of v and down, and the embedding, in Q6_K, which runs as int8."""
    config, held = RELEASED["gemma-3-27b"], 0
    for name, _, shape in all_names(config, 1):
        layer = int(name.split(".")[1]) if name.startswith("blocks.") else 0
        more = layer < config.layers // 8 or layer >= 7 * config.layers // 8 or (layer - config.layers // 8) % 3 == 2
        wide = name == "embedding" or (more and name.endswith((".attention.v", ".ffn.down")))
        kind = "Q6_K" if wide else "Q4_K"
        if not name.startswith("vision."):
            held += held_bytes(name, Stored(name, kind if len(shape) == 2 else "F32", shape, np.empty(0)), None)
    cache = config.cache_bytes(8192)
    assert 18e9 < held < 20.5e9 and held + cache < 22.5e9, f"{held / 1e9:.1f} GB and {cache / 1e9:.1f} GB"


@pytest.mark.parametrize("dtype", [None, "int4"])
def test_files_of_int4_without_minima_are_read(dtype):
    """As `minigemma quantize --dtype int4` wrote them before int4 had minima; they run where they lie."""
    x = np.random.default_rng(0).standard_normal((32, 96), np.float32)
    data = LAYOUTS["int4-symmetric"].pack(x)
    tensor = stored_tensor("up", "U8", data)
    assert (tensor.kind, tensor.shape) == ("INT4-SYMMETRIC", (32, 96))
    weight = converted_weight("blocks.0.ffn.down", tensor, dtype, 0.0, LargePages())
    assert np.shares_memory(weight.data, data) and weight.layout.name == "int4-symmetric"
    for other in ("int8", "f32"):  # the same integers and scales
        same = converted_weight("blocks.0.ffn.down", tensor, other, 0.0, LargePages())
        assert same.layout.name == other and np.array_equal(same.widen(), weight.widen())


@pytest.mark.parametrize("form, becomes", [("int8-row", "int8"), ("int4-row", "int4-symmetric"), ("sfp8", "bf16")])
@pytest.mark.parametrize("size", [1, 1e-9])
def test_stored_forms_become_layouts_that_run(form, becomes, size):
    """A row's scale is rounded to float16, codes of eight bits to bf16; what has no normal float16 becomes bf16."""
    x = np.random.default_rng(0).standard_normal((32, 96), np.float32) * np.float32(size)
    stored = STORED_FORMS[form].pack(x)
    tensor = Stored("up", form.upper(), (32, 96), stored)
    weight = converted_weight("blocks.0.ffn.up", tensor, None, 0.0, LargePages())
    assert weight.layout.name == (becomes if size == 1 else "bf16")
    if size == 1:
        assert weight.nbytes == held_bytes("blocks.0.ffn.up", tensor, None)
    wide = STORED_FORMS[form].unpack(stored)
    assert (np.abs(weight.widen() - wide) <= np.abs(wide) * (2**-11 if weight.layout.name != "bf16" else 2**-8)).all()


def _in_mapping(array):
    import mmap

    while array is not None:
        if isinstance(array, mmap.mmap) or isinstance(getattr(array, "obj", None), mmap.mmap):
            return True
        array = getattr(array, "base", None)
    return False


@pytest.mark.parametrize(
    "dtype, step",
    [
        *(("bf16", 2**-8), ("int8", 1 / 127), ("int4", 1 / 14), ("int4-symmetric", 1 / 7)),
        *(("int8-row", 1 / 127), ("int4-row", 2 / 3)),
    ],
)
def test_other_layouts_on_request(dtype, step, tmp_path):
    config, weights = CONFIGS["gemma2"], random_weights(CONFIGS["gemma2"])
    folder = write_folder(tmp_path / "hf", config, weights)
    model = mg.load(folder, dtype=dtype)
    runs = RUNS_AS.get(dtype, dtype)
    assert model.weights.blocks[0].attention.o.layout.name == runs
    assert model.weights.blocks[0].attention.q.layout.name == ("int8" if dtype == "int4" else runs)
    assert model.weights.embedding.layout.name == EIGHT_BITS.get(runs, runs)
    exact = weights["model.layers.0.self_attn.o_proj.weight"]
    assert 0 < np.abs(model.weights.blocks[0].attention.o.widen() - exact).max() <= np.abs(exact).max() * step


def test_describe_reads_sizes_from_the_headers(tmp_path):
    config = CONFIGS["gemma3"]
    about = describe(write_folder(tmp_path / "hf", config, random_weights(config)))
    assert about.config.non_embedding_parameters + about.config.embedding_parameters == about.weight_bytes // 4
    assert about.tensors["blocks.0.ffn.gate"] == ("F32", (512, 256), 4 * 512 * 256)
    assert [file.name for file in about.files] == ["model.safetensors"]


@pytest.mark.parametrize("dtype", [None, *FORMATS])
def test_describe_foretells_what_load_holds(dtype, tmp_path):
    import dataclasses

    config = CONFIGS["gemma3"]
    path = write_gguf(tmp_path / "model.gguf", config, random_weights(config), "Q5_0")

    def held(weights):
        if isinstance(weights, np.ndarray | Weight):
            return weights.nbytes
        if isinstance(weights, tuple):
            return sum(map(held, weights))
        return sum(held(getattr(weights, f.name)) for f in dataclasses.fields(weights)) if weights is not None else 0

    assert describe(path, dtype).weight_bytes == held(mg.load(path, dtype=dtype).weights)


def broken(tmp_path, change=None, edit=None):
    """The error that a folder gives whose weights or config were changed."""
    config = CONFIGS["gemma3"]
    weights = random_weights(config)
    if change:
        change(weights)
    folder = write_folder(tmp_path / "hf", config, weights)
    if edit:
        (folder / "config.json").write_text(json.dumps(config_json(config) | edit))
    with pytest.raises(mg.ModelFormatError) as error:
        mg.load(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_missing_tensors_are_named(tmp_path):
    assert "lacks 1 tensors: model.layers.2.mlp.up_proj.weight" in broken(
        tmp_path, lambda w: w.pop("model.layers.2.mlp.up_proj.weight")
    )


def test_unexpected_tensors_are_named(tmp_path):
    message = broken(tmp_path, lambda w: w.update({"model.layers.0.lora_A.weight": np.zeros(3, np.float32)}))
    assert "model.layers.0.lora_A.weight" in message


def test_wrong_shapes_are_named_with_both(tmp_path):
    message = broken(tmp_path, lambda w: w.update({"model.norm.weight": np.zeros(255, np.float32)}))
    assert "model.norm.weight is [255], the config implies [256]" in message


def test_wrong_types_are_named(tmp_path):
    message = broken(tmp_path, lambda w: w.update({"model.norm.weight": np.zeros(256, np.int64)}))
    assert "is of type I64" in message


@pytest.mark.parametrize(
    "edit, says",
    [
        ({"model_type": "llama"}, "model_type is 'llama'"),
        ({"num_hidden_layers": 10**9}, "layers"),
        ({"num_hidden_layers": 7.5}, "must be an integer"),
        ({"head_dim": 0}, "head_dim is 0"),
        ({"head_dim": 63}, "must be even"),
        ({"num_key_value_heads": 3}, "cannot share"),
        ({"sliding_window": -1}, "window is -1"),
        ({"vocab_size": 262208}, "the config implies [262208, 256]"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "rope_type is 'yarn'"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"layer_types": ["full_attention", "sliding_attention"] * 3 + ["full_attention"]}, "layer_types"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"rms_norm_eps": "small"}, "must be a number"),
    ],
)
def test_configs_that_are_refused(edit, says, tmp_path):
    assert says in broken(tmp_path, edit=edit)


def test_deepminds_own_names_are_recognised(tmp_path):
    def change(weights):
        weights["embedder.input_embedding"] = weights.pop("model.embed_tokens.weight")

    assert "DeepMind's own names" in broken(tmp_path, change)


def test_a_gguf_that_is_not_a_text_model(tmp_path):
    for architecture, says in (("clip", "mmproj"), ("llama", "'llama'")):
        gguf_files.write(tmp_path / "x.gguf", architecture, {}, {"a": np.zeros(3, np.float32)})
        with pytest.raises(mg.ModelFormatError, match=says):
            mg.load(tmp_path / "x.gguf")


@pytest.mark.parametrize(
    "arguments", [{"dtype": "fp8"}, {"backend": "torch"}, {"threads": 0}, {"threads": 4096}, {"threads": True}]
)
def test_arguments_that_are_refused(arguments, tmp_path):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        mg.load(tmp_path, **arguments)


def test_the_numpy_backend_runs_no_kernel(tmp_path, monkeypatch):
    """Every kernel is replaced by one that raises, and the whole model runs."""
    from minigemma.definition import DEFINITIONS

    config = CONFIGS["gemma2"]
    folder = write_folder(tmp_path / "hf", config, random_weights(config))
    expected = mg.load(folder).forward(ids)
    for made in DEFINITIONS.values():
        if made.fast:
            monkeypatch.setattr(made, "fast", lambda *_: 1 / 0)
    model = mg.load(folder, backend="numpy")
    cache = model.new_cache(60)
    np.testing.assert_allclose(model.forward(ids, cache), expected, atol=1e-4)
    model.forward([1], cache)
    with pytest.raises(ZeroDivisionError):
        mg.load(folder).forward(ids)


def test_ids_and_caches_are_checked_before_any_kernel_runs(tmp_path):
    config = CONFIGS["gemma"]
    model = mg.load(write_folder(tmp_path / "hf", config, random_weights(config)))
    for wrong in ([], [-1], [96], [0.5], [[1]], [2**40]):
        with pytest.raises(ValueError, match="id"):
            model.forward(wrong)
    with pytest.raises(ValueError, match="2 held \\+ 3 new"):
        cache = model.new_cache(4)
        model.forward([1, 2], cache)
        model.forward([1, 2, 3], cache)
    assert cache.position == 2
    with pytest.raises(ValueError, match="no vision tower"):
        model.forward([1], images=np.zeros((1, 3, 896, 896), np.float32))


@pytest.mark.parametrize("family", CONFIGS)
def test_every_layer_role_has_a_shape(family):
    config = CONFIGS[family]
    assert all(letters for i in range(config.layers) for _, _, letters in layer_tensors(config, i).values())


HEADS = (
    "lm_head.weight",
    "model.lm_head.weight",
    "language_model.lm_head.weight",
    "model.language_model.lm_head.weight",
)


@pytest.mark.parametrize("name", HEADS)
def test_a_head_of_its_own_is_used_whatever_the_config_says_of_tying(name, tmp_path):
    config = CONFIGS["gemma"]
    weights = random_weights(config)
    tied = mg.load(write_folder(tmp_path, config, weights))
    repeated = mg.load(write_folder(tmp_path, config, weights | {name: weights["model.embed_tokens.weight"]}))
    assert repeated.weights.head is None
    own = mg.load(write_folder(tmp_path, config, weights | {name: 2 * weights["model.embed_tokens.weight"]}))
    assert np.allclose(own.forward(ids), 2 * tied.forward(ids), rtol=1e-5)


BUFFERS = (
    "model.rotary_emb.inv_freq",
    "model.rotary_emb_local.inv_freq",
    "model.rotary_emb.full_attention_inv_freq",
    "model.layers.0.self_attn.rotary_emb.inv_freq",
    "model.embed_tokens.embed_scale",
    "model.embeddings.position_ids",
    "model.layers.0.self_attn.rotary_emb.cos_cached",
    "model.causal_mask",
    "model.norm.num_batches_tracked",
)


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_in_a_file_are_no_weights(name, tmp_path):
    config = CONFIGS["gemma"]
    folder = write_folder(tmp_path, config, random_weights(config) | {name: np.ones(6, np.float32)})
    assert name not in {tensor for tensor, *_ in describe(folder).tensors.values()}


def test_rope_factors_of_a_gguf_are_refused_unless_they_are_ones(tmp_path):
    config = CONFIGS["gemma3"]
    path = write_gguf(tmp_path / "a.gguf", config, random_weights(config), more={"rope_freqs.weight": np.ones(32)})
    assert describe(path).config.rope_base == config.rope_base
    write_gguf(path, config, random_weights(config), more={"rope_freqs.weight": np.linspace(1, 8, 32)})
    with pytest.raises(mg.ModelFormatError, match=r"has rope_freqs\.weight"):
        describe(path)


def test_a_tower_in_the_text_models_gguf_is_left_out(tmp_path):
    config = CONFIGS["gemma3"]
    more = {"v.patch_embedding.weight": np.zeros((4, 4)), "mm.mm_input_projection.weight": np.zeros((4, 4))}
    assert describe(write_gguf(tmp_path / "a.gguf", config, random_weights(config), more=more)).config.vision is None


BEFORE = ["module.", "_orig_mod.", "base_model.model.", "module._orig_mod.", "_fsdp_wrapped_module.", "student."]


@pytest.mark.parametrize("wrapper", BEFORE)
def test_wrappers_of_training_programs_change_nothing(wrapper, tmp_path):
    config = CONFIGS["gemma"]
    weights = random_weights(config)
    wrapped = write_folder(tmp_path, config, {f"{wrapper}{name}": w for name, w in weights.items()})
    assert len(describe(wrapped).tensors) == len(weights)


# --------------------------------------------------------------------------------------------- what a folder may be


@pytest.mark.parametrize("config", [False, True])
def test_a_lora_adapter_is_named_as_one(config, tmp_path):
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "google/gemma-3-1b-it"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(adapter))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"")
    if config:
        (tmp_path / "config.json").write_text(json.dumps(config_json(CONFIGS["gemma3"])))
    with pytest.raises(
        mg.ModelFormatError, match=r"is a LoRA adapter.*merge the adapter into .*'google/gemma-3-1b-it'"
    ):
        mg.load(tmp_path)


def test_a_byte_order_mark_in_a_json_file_is_no_error(tmp_path):
    folder = write_folder(tmp_path / "bom", CONFIGS["gemma3"], random_weights(CONFIGS["gemma3"]))
    config = folder / "config.json"
    config.write_bytes(b"\xef\xbb\xbf" + config.read_bytes())
    assert describe(folder).config.layers == CONFIGS["gemma3"].layers


def test_load_takes_up_what_the_checkpoint_states(tmp_path):
    folder = write_folder(tmp_path / "m", CONFIGS["gemma3"], random_weights(CONFIGS["gemma3"]))
    (folder / "generation_config.json").write_text(json.dumps({"temperature": 0.5, "eos_token_id": [1, 7]}))
    (folder / "chat_template.jinja").write_text("<|im_start|>{{ messages }}")
    with pytest.warns(UserWarning, match=r"its chat template writes <\|im_start\|>, not Gemma's turns"):
        model = mg.load(folder, backend="numpy")
    assert (model.eos, model.sampling, model.foreign_turns) == ((1, 7), {"temperature": 0.5}, "<|im_start|>")


def test_a_file_with_few_weights_in_four_bits_runs_them_in_eight():
    """As the demo's, whose only matrices in Q4_K are those of W_o; asked for int4, they stay what they are."""
    few, most = (
        {f"blocks.{i}.ffn.up": Stored("", kind, (64, 256), np.empty(0)) for i, kind in enumerate(kinds)}
        for kinds in (["Q4_K", "Q5_K", "Q5_K", "Q6_K", "Q8_0"], ["Q4_K", "Q4_K", "Q6_K"])
    )
    assert [runs_as(name, t, None) for name, t in in_mostly_other_bits(few).items()] == ["int8"] * 5
    assert [runs_as(name, t, None) for name, t in in_mostly_other_bits(most).items()] == ["int4", "int4", "int8"]
    assert runs_as("blocks.0.ffn.up", in_mostly_other_bits(few)["blocks.0.ffn.up"], "int4") == "int4"
