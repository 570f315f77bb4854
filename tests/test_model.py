"""model.py against transformers: logits, gradients, files; and its refusals."""
import json
import shutil

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
)

import model as model_module
from model import Qwen2, SharedPromptAttention
from objectives import noclip, policy_loss
from plumbing import fused_head, hub, onednn, packed
from plumbing.hub import TINY, to_hub
from rollout import flat_batch, generate

needs_onednn = pytest.mark.skipif(not onednn.is_large(torch.zeros(onednn.LARGE)),
                                  reason="oneDNN has no fast products on this processor")
SHAPES = [  # width, heads, K/V heads, MLP, layers, tied, family
    (14 * 8, 14, 2, 200, 2, True), (14 * 8, 14, 2, 200, 2, False), (64, 4, 4, 96, 3, False),
    (48, 6, 1, 100, 1, True), (128, 4, 2, 384, 3, True),
    (9 * 8, 9, 3, 200, 2, True, "llama"), (64, 4, 2, 96, 3, False, "llama"),
    (64, 4, 1, 96, 2, True, "llama3"), (48, 6, 2, 100, 3, True, "qwen3"),
    (64, 4, 4, 96, 2, False, "qwen3")]
FAMILIES = {  # settings of transformers, beside the shape
    "qwen2": ("qwen2", {"rope_theta": 1e6}), "llama": ("llama", {"rope_theta": 1e5}),
    "llama3": ("llama", {"rope_parameters": {  # the slow pairs are scaled, one of them in part
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64}}),
    "qwen3": ("qwen3", {"rope_theta": 1e6, "head_dim": 24})}



def theirs(width, heads, kv_heads, mlp, layers, tied, family="qwen2", vocabulary=97):
    """A transformers model with random weights large enough to matter, biases and norms too."""
    model_type, settings = FAMILIES[family]
    config = AutoConfig.for_model(
        model_type, vocab_size=vocabulary, hidden_size=width, num_attention_heads=heads,
        num_key_value_heads=kv_heads, intermediate_size=mlp, num_hidden_layers=layers,
        tie_word_embeddings=tied, max_position_embeddings=128, eos_token_id=5, **settings)
    network = AutoModelForCausalLM.from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    for name, p in network.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        p.data = mean + 0.1 * torch.randn(p.shape, generator=generator)
    return network


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def pair(request, tmp_path_factory):
    """(ours, theirs) with the same weights, ours loaded from the folder theirs saved."""
    folder = tmp_path_factory.mktemp("theirs")
    network = theirs(*request.param)
    network.save_pretrained(folder)
    return Qwen2.from_pretrained(folder), network


def random_batch(seed=0, vocabulary=97):
    """Two prompts with completions of different lengths, one of them empty."""
    g = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(vocabulary, (n,), generator=g).tolist()
    return [ids(9), ids(4)], [[ids(5), ids(1), ids(7)], [ids(3), ids(0)]]


def their_logps(network, prompts, completions, temperature):
    """Log-probs of all completion tokens, one padded row per completion: the textbook way."""
    rows = [(p, c) for p, group in zip(prompts, completions) for c in group]
    longest = max(len(p) + len(c) for p, c in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, (p, c) in enumerate(rows):
        ids[i, :len(p) + len(c)] = torch.tensor(p + c)
        mask[i, :len(p) + len(c)] = 1
    logits = network(ids, attention_mask=mask).logits / temperature
    logp = logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None]).squeeze(2)
    return torch.cat([logp[i, len(p) - 1:len(p) + len(c) - 1] for i, (p, c) in enumerate(rows)])


def test_logits_equal_transformers(pair):
    ours, network = pair
    ids = torch.randint(97, (50,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        attend = SharedPromptAttention([50], [[]])
        difference = (ours.logits(ours(ids, torch.arange(50), attend))
                      - network(ids[None]).logits[0]).abs().max().item()
    print(f"maximum difference of logits: {difference:.1e}")
    assert difference < 1e-5


@pytest.mark.parametrize("head_bytes", [2**29, 4 * 97 * 6], ids=["one chunk", "many chunks"])
def test_policy_gradient_equals_autograd_through_transformers(pair, head_bytes, machine,
                                                              monkeypatch):
    for device in ("cpu", "cuda"):  # 6 tokens: three chunks
        monkeypatch.setitem(model_module.HEAD_BYTES, device, head_bytes)
    ours, network = pair
    prompts, completions = random_batch()
    batch = flat_batch(prompts, completions)
    n = len(batch.target_M)
    g = torch.Generator().manual_seed(2)
    advantage, weight, shift = torch.randn(n, generator=g), torch.rand(n, generator=g) / n, 0.1
    old = their_logps(network, prompts, completions, 0.7).detach() - shift * advantage

    def loss(logp, chunk):
        return policy_loss(logp, old[chunk], advantage[chunk], weight[chunk],
                           batch.sequence_M[chunk], noclip)[0]
    ours.zero_grad()
    logp, _ = ours.accumulate_gradients(batch, 0.7, loss)
    network.zero_grad()
    expected = their_logps(network, prompts, completions, 0.7)
    loss(expected, slice(0, n)).backward()
    assert (logp - expected).abs().max() < 1e-5
    gradients = to_hub({n: p.grad for n, p in ours.named_parameters()}, ours.config)
    assert len(batch.chunks(head_bytes // (4 * 97))) == (1 if head_bytes == 2**29 else 3)
    for name, p in network.named_parameters():
        difference = (gradients[name] - p.grad).norm() / p.grad.norm()
        assert difference < 1e-5, (name, difference.item())


@needs_onednn
@pytest.mark.parametrize("bias", [True, False])
def test_products_by_onednn_have_the_values_and_gradients_of_torchs(bias, monkeypatch):
    monkeypatch.setattr(onednn, "LARGE", 1)
    monkeypatch.setattr(onednn, "mkl_is_slow", lambda: True)
    g = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=g, requires_grad=True)
               for shape in ((7, 12), (20, 12), (20,))[:2 + bias]]
    y = onednn.product(*tensors)
    assert type(y.grad_fn).__name__ == "ProductBackward"
    exact = F.linear(*(x.double() for x in tensors))
    torch.testing.assert_close(y.double(), exact, atol=1e-5, rtol=0)
    for loss in (torch.Tensor.sum, lambda y: y.square().sum()):  # a gradient of one number; of many
        for ours, theirs in zip(torch.autograd.grad(loss(y), tensors, retain_graph=True),
                                torch.autograd.grad(loss(exact), tensors, retain_graph=True)):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=0)
    with torch.no_grad():  # the old policy's pass: the same bits
        assert onednn.product(*tensors).equal(y)


def test_checkpointing_activations_changes_no_gradient(pair):
    ours, _ = pair
    batch = flat_batch(*random_batch())
    gradients, calls = [], []
    hook = ours.model["layers"][0].register_forward_pre_hook(lambda *_: calls.append(
        ours.checkpoint_activations))
    for ours.checkpoint_activations in (False, True):
        ours.zero_grad()
        ours.accumulate_gradients(batch, 0.7, lambda logp, chunk: logp.square().sum())
        gradients.append([p.grad.clone() for p in ours.parameters()])
    ours.checkpoint_activations = False
    hook.remove()
    assert calls == [False, True, True]  # checkpointed, a layer is computed again for its gradient
    assert all(map(torch.equal, *gradients))


def test_save_load_save_is_byte_identical_and_transformers_loads_it(pair, tmp_path):
    ours, network = pair
    ours.save_pretrained(tmp_path / "one")
    Qwen2.from_pretrained(tmp_path / "one").save_pretrained(tmp_path / "two")
    files = sorted(p.name for p in (tmp_path / "one").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "two").iterdir())
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert again.dtype == torch.float32
    ids = torch.arange(20)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, network(ids).logits)
    assert again.generation_config.eos_token_id == [5]


def test_older_files_spell_llama_3s_rotary_settings_otherwise(tmp_path):
    network = theirs(*next(shape for shape in SHAPES if "llama3" in shape))
    network.save_pretrained(tmp_path)
    newer = Qwen2.from_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scaling = config.pop("rope_parameters")
    config |= {"rope_theta": scaling.pop("rope_theta"), "rope_scaling": scaling}
    (tmp_path / "config.json").write_text(json.dumps(config))
    older = Qwen2.from_pretrained(tmp_path)
    tables = [model_module.rotary_table(torch.arange(128), m.config, torch.float32)
              for m in (newer, older)]
    assert all(map(torch.equal, *tables))


def test_bf16_weights_become_fp32_masters_and_are_saved_as_fp32(tmp_path):
    theirs(*SHAPES[0]).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    assert "bfloat16" in (tmp_path / "bf16" / "config.json").read_text()
    ours = Qwen2.from_pretrained(tmp_path / "bf16")
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    ours.save_pretrained(tmp_path / "fp32")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "fp32").dtype == torch.float32


def test_sharded_weights_load(tmp_path):
    network = theirs(*SHAPES[1])
    network.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    ours = Qwen2.from_pretrained(tmp_path / "sharded")
    weights = to_hub(ours.state_dict(), ours.config)
    for name, p in network.named_parameters():
        assert torch.equal(weights[name], p)


def test_the_sampling_twin_shares_fp32_weights_and_casts_bf16_ones(pair):
    ours, _ = pair
    twin = ours.for_sampling()
    name = "model.layers.0.mlp.gate_up_proj.weight"
    p, q = ours.get_parameter(name), twin.get_parameter(name)
    assert p.data_ptr() == q.data_ptr() and p.requires_grad and not q.requires_grad
    ours.compute_dtype = torch.bfloat16
    try:
        q = ours.for_sampling().get_parameter(name)
    finally:
        ours.compute_dtype = torch.float32
    assert q.dtype == torch.bfloat16 and torch.equal(q, p.to(torch.bfloat16))


def test_tokens_beyond_the_tokenizer_have_no_probability(pair):
    ours, _ = pair
    ours.n_real_ids = 90
    try:
        logp = ours.log_probs(torch.randn(3, ours.config["hidden_size"]))
    finally:
        ours.n_real_ids = 97
    assert logp.shape == (3, 96) and not logp[:, 90:].exp().any()
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(3))


def test_the_gradient_of_a_head_with_rows_beyond_the_tokenizer(pair):
    """90 of 97 rows are tokens; the product takes 96, and the six more change nothing."""
    ours, _ = pair
    batch = flat_batch(*random_batch(vocabulary=90))
    ours.n_real_ids = 90
    try:
        assert ours.n_head_rows == 96
        hidden_MC = ours.predicting_states(batch).detach().requires_grad_()
        head_VC = ours.head_weight.detach().requires_grad_()
        logp_MV = (hidden_MC @ head_VC[:90].T / 0.7).log_softmax(-1)
        (logp_MV.gather(1, batch.target_M[:, None])).square().sum().backward()
        ours.zero_grad()
        target_M1 = batch.target_M[:, None]
        g_M1 = 2 * logp_MV.gather(1, target_M1).detach() / 0.7
        with torch.no_grad():
            logits_MV = ours.masked_logits(hidden_MC)
            *_, rest = model_module.log_probs_of(logits_MV, target_M1, 0.7, entropy=False)
        at_once_MV = fused_head.logit_gradient(*rest, target_M1, g_M1, torch.float32)
        gradient_MV = model_module.logit_gradient(*rest, target_M1, g_M1, torch.float32)
        torch.testing.assert_close(at_once_MV, gradient_MV)
        gradient_MC = ours.head_backward(gradient_MV, hidden_MC, ours.head_weight[:96])
    finally:
        ours.n_real_ids = 97
    torch.testing.assert_close(gradient_MC, hidden_MC.grad)
    torch.testing.assert_close(ours.head_weight.grad, head_VC.grad)
    assert not ours.head_weight.grad[90:].any()


# ------------------------------------------------------------------ sequences end to end

def kernel_in_words(q_NHD, k_JKD, v_JKD, query_ends, key_ends, longest_q, longest_k, *rest):
    """What FlashAttention-2 does, sequence by sequence."""
    assert rest == (0.0, True, False)  # no dropout, causal, no mask wanted
    assert longest_q == query_ends.diff().max() and longest_k == key_ends.diff().max()
    outs = []
    for b in range(len(query_ends) - 1):
        q, k, v = (x[ends[b]:ends[b + 1]].transpose(0, 1) for x, ends in (
            (q_NHD, query_ends), (k_JKD, key_ends), (v_JKD, key_ends)))
        k, v = (x.repeat_interleave(len(q) // len(x), 0) for x in (k, v))
        visible = torch.ones(q.shape[1], k.shape[1]).tril(k.shape[1] - q.shape[1]).bool()
        score = (q @ k.mT * q.shape[-1]**-0.5).masked_fill(~visible, -torch.inf)
        outs.append((score.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outs), None


def test_packed_attention_equals_padded_attention(pair, monkeypatch):
    monkeypatch.setattr(packed, "flash_attention", kernel_in_words)
    ours, _ = pair
    prompts, completions = random_batch()
    sizes = [len(p) for p in prompts], [[len(c) for c in group] for group in completions]
    H, K, D = (ours.config[name] for name in ("num_attention_heads", "num_key_value_heads",
                                              "head_dim"))
    qkv = [torch.randn(29, heads, D) for heads in (H, K, K)]
    expected = model_module.SharedPromptAttention(*sizes)(0, *qkv)
    attention = model_module.SharedPromptAttention(*sizes, packs=True)
    torch.testing.assert_close(attention.packed.attend(*qkv), expected)
    assert attention(0, *qkv).equal(expected)  # fp32 is padded
    half = [x.bfloat16() for x in qkv]
    assert attention(0, *half).equal(attention.packed.attend(*half))


def test_a_kernel_that_errs_is_not_used_and_the_run_says_so(monkeypatch, capsys):
    def works(kernel):
        monkeypatch.setattr(packed, "flash_attention", kernel)
        packed.packed_works.cache_clear()
        monkeypatch.setattr(packed, "runs_on", lambda device: True)
        return packed.packed_works(model_module.SharedPromptAttention, torch.device("cpu"))

    def missing(*arguments):
        raise NotImplementedError("no such kernel\nand more")
    try:
        assert works(kernel_in_words) and capsys.readouterr().err == ""
        assert not works(lambda *a: (kernel_in_words(*a)[0] * 1.1, None))
        assert "on cpu: the two differ by" in capsys.readouterr().err
        assert not works(missing)
        assert "attention pads its sequences on cpu: no such kernel\n" in capsys.readouterr().err
    finally:
        packed.packed_works.cache_clear()


def edited(tmp_path, **changes):
    """The embedded model's folder with other values in its config.json."""
    folder = tmp_path / "edited"
    shutil.copytree(model_module.Path(model_module.__file__).parent / "tiny" / "model", folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("changes, message", [
    ({"model_type": "mistral"}, "'mistral'; expected 'qwen2', 'qwen3', 'llama'"),
    ({"model_type": "llama"}, "do not fit config.json.*bias: expected None, found"),
    ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is True"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias is True"),
    ({"rope_parameters": {"rope_type": "llama3"}}, "factor is None"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type is 'yarn'"),
    ({"use_sliding_window": True}, "use_sliding_window"),
    ({"intermediate_size": 100}, "do not fit config.json.*expected .*found"),
    ({"num_hidden_layers": 4}, "do not fit config.json.*layers.3.*found None")])
def test_what_is_not_computed_here_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        Qwen2.from_pretrained(edited(tmp_path, **changes))


def test_a_folder_that_is_no_model_folder_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match="no config.json"):
        Qwen2.from_pretrained(tmp_path)
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="run is a run; its models are .*best and"):
        Qwen2.from_pretrained(tmp_path / "run")
    with pytest.raises(FileNotFoundError, match="is a file; give the model folder"):
        Qwen2.from_pretrained(tmp_path / "run" / "config.json")
    folder = edited(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model.safetensors: weights are missing"):
        Qwen2.from_pretrained(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json: expected a JSON file"):
        Qwen2.from_pretrained(folder)


def test_every_stop_token_of_every_file_is_a_stop_id():
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|user|>{{ m['role'] + m['content'] }}<end>{% endfor %}")
    found = hub.find_stop_ids(tokenizer, {"eos_token_id": 11}, {"eos_token_id": [12, 11]})
    assert found == [0, 11, 12, 259] and tokenizer.eos_token_id == 0
    assert hub.find_stop_ids(None, {"eos_token_id": None}, {}) == []


def test_ids_that_no_token_has_are_never_given_probability(tmp_path):
    vocabulary = 300  # rows of the head; the tokenizer has 259 tokens
    theirs(*SHAPES[4], vocabulary=vocabulary).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / name, tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    tokens = {**{token["content"]: token["id"] for token in content["added_tokens"]},
              **content["model"]["vocab"]}
    moved = [name for name, i in tokens.items() if i in (100, 200)]  # to the end, past two gaps
    for name, i in zip(moved, (270, 280)):
        content["model"]["vocab"][name] = i
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    nameless = [100, 200, *range(259, 270), *range(271, 280)]
    for model in (Qwen2.from_pretrained(tmp_path), Qwen2.from_pretrained(tmp_path).for_sampling()):
        assert model.n_real_ids == 281 and model.nameless_ids.tolist() == nameless
        for temperature in (1.0, 0.01, 2.0):
            logp = model.log_probs(torch.randn(3, model.config["hidden_size"]), temperature)
            assert (logp[:, nameless].exp() == 0).all() and logp.shape == (3, model.n_head_rows)
            torch.testing.assert_close(logp.exp().sum(-1), torch.ones(3))
            assert model_module.entropy_of(logp).isfinite().all()
    model = Qwen2.from_pretrained(tmp_path)
    drawn = generate(model, [[5, 6]], 64, 16).completions[0]
    assert not {i for ids in drawn for i in ids} & set(nameless)
    _, entropy = model.accumulate_gradients(flat_batch([[5, 6]], [drawn]), 0.7,
                                            lambda logp, chunk: logp.sum(), entropy=True)
    assert entropy.isfinite().all() and not model.head_weight.grad[nameless].any()


def test_a_token_that_the_library_adds_is_no_token_of_the_folder(tmp_path):
    # DeepSeek-R1-Distill-Qwen has an end of its own, and transformers adds <|endoftext|>
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((TINY / name).read_text().replace("<|endoftext|>", "<|done|>"))
    tokenizer, named, _ = hub.load_tokenizer(tmp_path)
    assert len(tokenizer) == 260 and max(named) == 258 and len(named) == 259
    tokenizer, named, _ = hub.load_tokenizer(TINY)
    assert len(tokenizer) == 259 == len(named)


def test_a_folder_without_its_tokenizer_is_refused(tmp_path):
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((TINY / name).read_bytes())
    with pytest.raises(ValueError, match="tokenizer files cannot be used"):
        Qwen2.from_pretrained(tmp_path)
