"""Import and export: bit for bit the same tensors, complete directories, and refusals that leave nothing behind."""

import hashlib
import json
import shutil
from collections import Counter, namedtuple
from functools import partial

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from megarl.bridge.boxes import num_elements
from megarl.checkpoint import hf_export, publish, sharded, streams
from megarl.checkpoint.export_proof import check_names
from megarl.checkpoint.hf_export import export
from megarl.checkpoint.hf_files import tokenizer_note
from megarl.checkpoint.hf_import import import_hf
from megarl.checkpoint.manifest import manifest_hash_line, read_manifest
from megarl.checkpoint.model_card import load_snippet
from megarl.checkpoint.sharded import TensorEntry, whole
from megarl.checkpoint.sources import CheckpointSource, SafetensorsSource, open_weights
from megarl.checkpoint.streams import plan_shards
from megarl.data.tokenizers import load_tokenizer
from megarl.errors import CheckpointError, SetupError, WeightMapError
from tests.unit.text_files import sentencepiece_file

SIZES = dict(
    vocab_size=100, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8
)
FAMILIES = {
    "llama": transformers.LlamaConfig,
    "qwen2": transformers.Qwen2Config,
    "qwen3": transformers.Qwen3Config,
    "mistral": partial(transformers.MistralConfig, sliding_window=8),
    "gemma3_text": partial(transformers.Gemma3TextConfig, sliding_window=8, query_pre_attn_scalar=8),
    "mixtral": partial(transformers.MixtralConfig, num_local_experts=4),
    "qwen3_moe": partial(transformers.Qwen3MoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
}


@pytest.fixture(scope="module")
def tokenizer_model(tmp_path_factory):
    """A sentencepiece file with fewer tokens than the models have."""
    sums = [f"{a}+{b}={a + b}" for a in range(40) for b in range(40)]
    return sentencepiece_file(tmp_path_factory.mktemp("tokenizer") / "sp.model", sums, vocab_size=40)


def save_hf(directory, tokenizer_model, family="llama", tied=False, scalar_head=False, shard="5GB", dtype=torch.float32):
    """A tiny model with random weights as transformers writes it."""
    torch.manual_seed(0)
    config = FAMILIES[family](**SIZES, tie_word_embeddings=tied)
    config.num_labels = 1 if scalar_head else 2
    auto = transformers.AutoModelForSequenceClassification if scalar_head else transformers.AutoModelForCausalLM
    model = auto.from_config(config).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(directory, max_shard_size=shard)
    load_tokenizer(tokenizer_model).save_for_export(directory)
    return model


def tensors_in(directory):
    return {name: tensor for file in directory.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("family, tied", [(family, family in ("qwen2", "gemma3_text", "qwen3_moe")) for family in FAMILIES])
def test_import_and_export_keep_every_bit(tmp_path, tokenizer_model, family, tied):
    save_hf(tmp_path / "hf", tokenizer_model, family, tied, shard="20KB", dtype=torch.bfloat16)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", max_shard_bytes=15_000)
    before, after = tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(after[name].dtype == torch.bfloat16 and torch.equal(before[name], after[name]) for name in before)
    shards = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert len(shards) > 1 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    model, ids = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), torch.arange(12)[None]
    torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=0.02, atol=0.02)  # bf16 kernels depend on alignment
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    own = load_tokenizer(tmp_path / "hf")
    assert tokens("12+3=15", add_special_tokens=False).input_ids == own.encode("12+3=15")
    assert again.generation_config.eos_token_id == own.eos_id and again.config.pad_token_id == own.pad_id
    assert "megarl" in (tmp_path / "out" / "README.md").read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"hf", "checkpoint", "out"}, "no staging directory is left"


def test_a_tokenizer_that_transformers_reads_otherwise_is_told(tmp_path, tokenizer_model):
    own = load_tokenizer(tokenizer_model)
    for family in FAMILIES:
        own.save_for_export(tmp_path / "own")
        own.save_for_export(tmp_path / family)
        FAMILIES[family](**SIZES).save_pretrained(tmp_path / family)
        note = tokenizer_note(tmp_path / "own", tmp_path / family)
        assert ("PreTrainedTokenizerFast" in note) == (family == "qwen2"), "transformers reads every tokenizer of a qwen2 as Qwen's"
    tokens = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "qwen2")
    assert tokens("12+3=15", add_special_tokens=False).input_ids == own.encode("12+3=15")


@pytest.mark.parametrize("family, architecture", [("llama", "Llama"), ("gemma3_text", "Gemma3Text"), ("mixtral", "Mixtral")])
def test_a_reward_model_is_exported_with_its_head(tmp_path, tokenizer_model, family, architecture):
    model = save_hf(tmp_path / "hf", tokenizer_model, family, tied=family == "gemma3_text", scalar_head=True)
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert again.config.num_labels == 1 and again.config.architectures == [f"{architecture}ForSequenceClassification"]
    ids = torch.arange(4, 16)[None]
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits)


def test_export_in_another_dtype(tmp_path, tokenizer_model):
    save_hf(tmp_path / "hf", tokenizer_model)
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out", dtype="bf16")
    before, after = tensors_in(tmp_path / "hf"), tensors_in(tmp_path / "out")
    assert all(torch.equal(before[name].bfloat16(), after[name]) for name in before)
    with pytest.raises(SetupError, match="int4"):
        export(tmp_path / "checkpoint", tmp_path / "out2", dtype="int4")


def test_a_block_of_rows_at_a_time(tmp_path, imported, monkeypatch):
    monkeypatch.setattr(streams.row_blocks, "__defaults__", (512,))
    asked = []
    original = CheckpointSource.read
    monkeypatch.setattr(CheckpointSource, "read", lambda self, name, box: asked.append((name, box)) or original(self, name, box))
    export(imported, tmp_path / "out", proof="elements")
    assert max(num_elements(box) for _, box in asked) * 4 <= 512
    rows = Counter(name for name, _ in asked)
    assert rows["model.norm.weight"] == 2 and rows["lm_head.weight"] > 20, "once to write, once to compare"


@pytest.mark.parametrize("what", ["element", "name", "logits"])
def test_an_export_that_is_not_what_it_should_be_gets_no_name(tmp_path, imported, monkeypatch, what):
    if what == "element":  # one bit differs on the disk
        original = hf_export._write_rest

        def damage(staging, plan):
            note = original(staging, plan)
            path = next(staging.glob("*.safetensors"))
            path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
            return note

        monkeypatch.setattr(hf_export, "_write_rest", damage)
    elif what == "name":
        monkeypatch.setattr(hf_export, "check_names", lambda directory, shapes: check_names(directory, shapes | {"lost": (3,)}))
    else:  # a rule of the table is wrong: the same tensors, another model
        original_config = hf_export.hf_config
        monkeypatch.setattr(hf_export, "hf_config", lambda *given: original_config(*given) | {"rms_norm_eps": 0.5})
    reason = {"element": "differs in rows", "name": r"lost \(3,\) instead of None", "logits": "logits of transformers differ"}[what]
    with pytest.raises(CheckpointError, match=reason):
        export(imported, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_numbers_too_large_for_float16_are_refused(tmp_path, tokenizer_model):
    save_hf(tmp_path / "hf", tokenizer_model)
    tensors = tensors_in(tmp_path / "hf")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match=r"model.norm.weight holds 1e\+05; float16 ends at 65504: export as bf16"):
        export(tmp_path / "checkpoint", tmp_path / "out", dtype="fp16")


def test_the_readme_says_what_was_proven(tmp_path, imported):
    text = (export(imported, tmp_path / "out", max_shard_bytes=40_000) / "README.md").read_text()
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1 and all(f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}" in text for path in files)
    for words in (
        'base_model: "hf"',
        "read back and compared",
        "exactly these 21 tensors",
        "logits on 3 fixed prompts",
        "AutoModelForCausalLM",
    ):
        assert words in text, words
    assert str(tmp_path) not in text, "no path of this machine"
    snippet = text.split("```python\n")[1].split("```")[0].replace("DIRECTORY", repr(str(tmp_path / "out")))
    names = {}
    exec(compile(snippet, "README", "exec"), names)
    assert names["model"].config.vocab_size == SIZES["vocab_size"]


@pytest.mark.parametrize("model", ["reward", "critic"])
def test_the_snippet_of_a_scalar_head_loads_it(tmp_path, tokenizer_model, model):
    save_hf(tmp_path / "hf", tokenizer_model, scalar_head=True)
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")
    names = {"DIRECTORY": tmp_path / "out", "prompt": "1+1=", "response": "2"}
    exec(compile(load_snippet(model), "README", "exec"), names)
    found = names["score"] if model == "reward" else names["values"][-1]
    torch.testing.assert_close(found, names["model"](names["ids"]).logits[0, 0])


def test_several_end_tokens_survive_the_way_through_a_checkpoint(tmp_path, tokenizer_model):
    save_hf(tmp_path / "hf", tokenizer_model)
    ends = [load_tokenizer(tokenizer_model).eos_id, 33]
    change_json(tmp_path / "hf" / "generation_config.json", eos_token_id=ends)
    change_json(tmp_path / "hf" / "config.json", eos_token_id=ends[0])
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == ends


def test_boxes_are_parts_of_tensors(tmp_path, tokenizer_model):
    save_hf(tmp_path / "hf", tokenizer_model)
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    name, box = "model.layers.1.mlp.down_proj.weight", ((3, 10), (40, 8))
    expected = tensors_in(tmp_path / "hf")[name][3:13, 40:48]
    for source in (SafetensorsSource(tmp_path / "hf"), CheckpointSource(tmp_path / "checkpoint", "actor")):
        assert torch.equal(source.read(name, box), expected)
        assert source.shape(name) == (32, 48)


def test_shards_hold_at_most_what_they_may():
    entries = [TensorEntry(str(i), torch.float32, (size,)) for i, size in enumerate([3, 3, 9, 1, 1, 2])]
    assert [[entry.key for entry in shard] for shard in plan_shards(entries, 24)] == [["0", "1"], ["2"], ["3", "4", "5"]]


def test_which_model_a_role_gets(tmp_path, tokenizer_model):
    save_hf(tmp_path / "lm", tokenizer_model, tied=True)
    save_hf(tmp_path / "rm", tokenizer_model, scalar_head=True)
    spec, source = open_weights(tmp_path / "lm", "critic")
    head = source.read("score.weight", whole((1, 32)))
    assert head.abs().sum() > 0 and torch.equal(head, open_weights(tmp_path / "lm", "critic")[1].read("score.weight", whole((1, 32))))
    _, source = open_weights(tmp_path / "rm", "critic")
    assert torch.equal(source.read("score.weight", whole((1, 32))), tensors_in(tmp_path / "rm")["score.weight"])
    for path, role, reason in [(tmp_path / "lm", "reward", "reward model"), (tmp_path / "rm", "actor", "language model")]:
        with pytest.raises(CheckpointError, match=reason):
            open_weights(path, role)
        import_hf(path, tmp_path / f"{path.name}-checkpoint")
        with pytest.raises(CheckpointError, match=reason):
            open_weights(tmp_path / f"{path.name}-checkpoint", role)
    assert open_weights(tmp_path / "rm-checkpoint", "reward")[0] == open_weights(tmp_path / "rm", "reward")[0]


def test_a_generation_config_survives_the_way_through_a_checkpoint(tmp_path, tokenizer_model):
    save_hf(tmp_path / "hf", tokenizer_model)
    change_json(tmp_path / "hf" / "generation_config.json", temperature=0.6, top_p=0.95, do_sample=True)
    import_hf(tmp_path / "hf", tmp_path / "checkpoint")
    export(tmp_path / "checkpoint", tmp_path / "out")
    found = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert (found.temperature, found.top_p, found.do_sample) == (0.6, 0.95, True)


def test_import_in_another_dtype(tmp_path, tokenizer_model):
    save_hf(tmp_path / "hf", tokenizer_model)
    source = CheckpointSource(import_hf(tmp_path / "hf", tmp_path / "checkpoint", dtype="bf16"), "actor")
    before = tensors_in(tmp_path / "hf")
    assert all(torch.equal(source.read(name, whole(tensor.shape)), tensor.bfloat16()) for name, tensor in before.items())


def test_import_refuses_code(tmp_path, tokenizer_model):
    save_hf(tmp_path / "hf", tokenizer_model)
    for name, content, reason in [("modeling_x.py", "boom()", "is code"), ("processor_config.json", '{"auto_map": {}}', "auto_map")]:
        (tmp_path / "hf" / name).write_text(content)
        with pytest.raises(WeightMapError, match=reason):
            import_hf(tmp_path / "hf", tmp_path / "checkpoint")
        (tmp_path / "hf" / name).unlink()
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def change_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_hugging_face_directories_that_are_refused(tmp_path, tokenizer_model):
    save_hf(tmp_path / "good", tokenizer_model, shard="20KB")

    def copy(name):
        return shutil.copytree(tmp_path / "good", tmp_path / name)

    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        open_weights(tmp_path / "nowhere", "actor")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither"):
        open_weights(tmp_path / "empty", "actor")
    change_json(copy("code") / "config.json", auto_map={"AutoModel": "x.Y"})
    with pytest.raises(WeightMapError, match="auto_map"):
        open_weights(tmp_path / "code", "actor")
    index = copy("outside") / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    change_json(index, weight_map=weight_map | {"lm_head.weight": "../good/" + weight_map["lm_head.weight"]})
    with pytest.raises(WeightMapError, match="lm_head.weight in '../good/.*refused"):
        open_weights(tmp_path / "outside", "actor")
    index = copy("missing") / "model.safetensors.index.json"
    change_json(index, weight_map={name: file for name, file in weight_map.items() if name != "lm_head.weight"})
    with pytest.raises(WeightMapError, match="index.json: tensor lm_head.weight is missing"):
        open_weights(tmp_path / "missing", "actor")
    index = copy("wrong file") / "model.safetensors.index.json"
    other = next(file for file in weight_map.values() if file != weight_map["lm_head.weight"])
    change_json(index, weight_map=weight_map | {"lm_head.weight": other})
    with pytest.raises(WeightMapError, match=f"{other}: tensor lm_head.weight"):
        open_weights(tmp_path / "wrong file", "actor")
    change_json(copy("sizes") / "config.json", vocab_size=101)
    with pytest.raises(WeightMapError, match=r"\[100, 32\].*\[101, 32\]"):
        open_weights(tmp_path / "sizes", "actor")
    (copy("broken") / other).write_bytes(b"not safetensors")
    with pytest.raises(WeightMapError, match=other):
        open_weights(tmp_path / "broken", "actor")
    pickled = copy("pickled")
    for path in pickled.glob("model*"):
        path.unlink()
    torch.save({}, pickled / "pytorch_model.bin")
    with pytest.raises(WeightMapError, match="pytorch_model.bin, a pickle.*save_pretrained"):
        open_weights(pickled, "actor")


@pytest.fixture(scope="module")
def imported(tmp_path_factory, tokenizer_model):
    folder = tmp_path_factory.mktemp("imported")
    save_hf(folder / "hf", tokenizer_model)
    return import_hf(folder / "hf", folder / "checkpoint")


def test_export_refuses_what_is_not_there(imported, tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint"):
        export(tmp_path / "nowhere", tmp_path / "out")
    with pytest.raises(CheckpointError, match="'critic'"):
        export(imported, tmp_path / "out", model="critic")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(SetupError, match="not an empty directory"):
        export(imported, tmp_path / "full")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["full"]


def test_export_refuses_a_full_disk_before_writing(imported, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(publish.shutil, "disk_usage", lambda path: usage(10, 10, 12345))
    with pytest.raises(SetupError, match="12345 bytes free"):
        export(imported, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_one_clear_line(imported, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SetupError, match="file.*: choose another directory to export to"):
        export(imported, tmp_path / "file" / "out")
    with pytest.raises(SetupError, match="file.*: choose another directory to import to"):
        import_hf(imported.parent / "hf", tmp_path / "file" / "out")


def test_a_disk_that_fills_up_is_one_clear_line(imported, tmp_path, monkeypatch):
    def full(file, block):
        raise OSError(28, "No space left on device", str(tmp_path))

    monkeypatch.setattr(sharded, "_write_all", full)
    with pytest.raises(SetupError, match="No space left on device"):
        export(imported, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_export_refuses_flipped_bits(imported, tmp_path):
    damaged = shutil.copytree(imported, tmp_path / "damaged")
    path = next((damaged / "actor").glob("weights-*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="BLAKE3"):
        export(damaged, tmp_path / "out")
    assert not (tmp_path / "out").exists() and not (tmp_path / ".staging-out").exists()


@pytest.mark.parametrize("fault", ["lost", "twice"])
def test_every_element_is_there_exactly_once(imported, tmp_path, fault):
    damaged = shutil.copytree(imported, tmp_path / "damaged")
    content = json.loads((damaged / "manifest.json").read_text())
    file = content["files"]["actor/weights-00000.safetensors"]
    file["tensors"] = file["tensors"][1:] if fault == "lost" else [*file["tensors"], file["tensors"][0]]
    data = json.dumps(content).encode()
    (damaged / "manifest.json").write_bytes(data)
    (damaged / "manifest.json.sha256").write_bytes(manifest_hash_line(hashlib.sha256(data).hexdigest()))
    with pytest.raises(CheckpointError, match={"lost": "elements", "twice": "held twice"}[fault]):
        export(damaged, tmp_path / "out")


def test_import_leaves_out_what_the_table_does_not_name(tmp_path, tokenizer_model):
    save_hf(tmp_path / "hf", tokenizer_model, tied=True)
    tensors = load_file(tmp_path / "hf" / "model.safetensors")
    extra = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | extra, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    manifest = read_manifest(import_hf(tmp_path / "hf", tmp_path / "checkpoint"))
    assert manifest.models["actor"].shapes.keys() == tensors.keys()
