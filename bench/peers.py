"""The peers, on the same weights, prompts and lengths: transformers' `generate`, TRL's trainer.

Everything here needs bench/requirements.txt; ours alone needs none of it.
"""
import functools

import torch

from plumbing.hub import to_hub
from plumbing.metrics import clock


def hf_model(ours):
    """transformers' network with the weights of ours (its own copy)."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    config = Qwen2Config(**{k: v for k, v in ours.config.items() if k != "model_type"})
    config.eos_token_id = config.bos_token_id = None
    theirs = Qwen2ForCausalLM(config)
    weights = {k: v.detach().cpu() for k, v in to_hub(ours.state_dict(), ours.config).items()}
    missing, unexpected = theirs.load_state_dict(weights, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    theirs.tie_weights()
    theirs.generation_config.eos_token_id = None
    theirs.generation_config.pad_token_id = 0
    return theirs.to(ours.device, ours.compute_dtype)


def hf_generate(network, prompts, group_size, max_new_tokens, temperature=1.0, top_p=1.0,
                cache="dynamic", **more):
    """transformers' generate on left-padded rows, each prompt `group_size` times: (B, T) ids."""
    longest = max(map(len, prompts))
    rows = [p for p in prompts for _ in range(group_size)]
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in rows], device=network.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in rows],
                        device=network.device)
    with torch.inference_mode():
        out = network.generate(input_ids=ids, attention_mask=mask, do_sample=True, top_k=0,
                               temperature=temperature, top_p=top_p, max_new_tokens=max_new_tokens,
                               cache_implementation=None if cache == "dynamic" else cache,
                               disable_compile=True, **more)
    return out[:, longest:]


def tokenizer(vocabulary, eos):
    """Texts such as "17 4 88" stand for these ids. Padding is id 0, `eos` may lie outside."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = {str(i): i for i in range(max(vocabulary, eos + 1))}
    fast = Tokenizer(models.WordLevel(words, unk_token="0"))
    fast.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=fast, eos_token=str(eos), pad_token="0")


def trl_rounds(network, prompts, group_size, max_new_tokens, rounds, between, folder,
               temperature=1.0, top_p=1.0, iterations=2, cache="static", device_batch=None,
               threads=2):
    """Train `network` (transformers') with TRL's GRPOTrainer: `rounds` rollouts, each
    used `iterations` times.

    between(): called after each rollout's last update, outside the time; this is where ours runs,
    so that the two take turns. Returns one {"cycle", "sample"} of seconds for each round.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer
    vocabulary, B = network.config.vocab_size, len(prompts) * group_size
    device_batch, device = device_batch or B, network.device
    bf16, network = network.dtype == torch.bfloat16, network.float()
    config = GRPOConfig(
        output_dir=str(folder), use_cpu=device.type == "cpu", bf16=bf16,
        per_device_train_batch_size=device_batch, gradient_accumulation_steps=B // device_batch,
        num_generations=group_size, num_iterations=iterations, max_completion_length=max_new_tokens,
        max_steps=rounds * iterations, temperature=temperature, top_p=top_p, top_k=0,
        cache_implementation=None if cache == "dynamic" else cache, gradient_checkpointing=False,
        learning_rate=1e-6, beta=0.0, save_strategy="no", report_to="none", logging_strategy="no",
        disable_tqdm=True, shuffle_dataset=False, optim="adamw_torch_fused",
        generation_kwargs={"eos_token_id": -1})

    def rewards(completions, **_):
        return torch.rand(len(completions), generator=generator).tolist()

    marks, samples = [], []

    class Turns(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            if state.global_step % iterations == 0:
                marks.append(clock(str(device)) - self.began)
                between()
                self.began = clock(str(device))

        def on_train_begin(self, *_, **__):
            self.began = clock(str(device))

    generator, turns = torch.Generator().manual_seed(0), Turns()
    rows = [{"prompt": " ".join(map(str, p))} for p in prompts] * rounds
    trainer = GRPOTrainer(model=network, args=config, train_dataset=Dataset.from_list(rows),
                          reward_funcs=rewards, processing_class=tokenizer(vocabulary, vocabulary),
                          callbacks=[turns])
    plain = network.generate  # TRL's sampler is transformers' generate

    @functools.wraps(plain)
    def timed(*args, **kwargs):
        began = clock(str(device))
        out = plain(*args, **kwargs)
        samples.append(clock(str(device)) - began)
        assert out.shape[1] - kwargs["input_ids"].shape[1] == max_new_tokens
        return out
    network.generate = timed
    torch.set_num_threads(threads)
    trainer.train()
    return [{"cycle": cycle, "sample": sample} for cycle, sample in zip(marks, samples)]


def ended_by(lengths, prompt_length, eos):
    """A logits processor that ends row b with `eos` as token number lengths[b], never before."""
    from transformers import LogitsProcessor, LogitsProcessorList

    class Limit(LogitsProcessor):
        def __call__(self, ids, scores):
            last = torch.tensor(lengths, device=ids.device) == ids.shape[1] - prompt_length + 1
            scores = scores.masked_fill(last[:, None], -torch.inf)
            scores[:, eos] = torch.where(last, 0.0, -torch.inf)
            return scores
    return LogitsProcessorList([Limit()])


def hf_ragged(network, prompts, group_size, lengths, slots, cache="dynamic"):
    """`generate` on rows of given lengths, `slots` rows at a time: tokens kept."""
    kept, eos = 0, network.config.vocab_size - 1
    for i in range(0, len(prompts), slots // group_size):
        some = prompts[i:i + slots // group_size]
        part = lengths[i * group_size:(i + len(some)) * group_size]
        out = hf_generate(network, some, group_size, max(part), cache=cache, eos_token_id=eos,
                          logits_processor=ended_by(part, max(map(len, some)), eos))
        assert out.shape[1] == max(part)
        kept += sum(part)
    return kept


def full_logits(model, batch, temperature, loss):
    """Log-probs the obvious way: every logit at once, autograd through all of them."""
    hidden_MC = model(batch.ids_N, batch.positions_N, batch.attend)[batch.predictor_M]
    logp_MV = (model.logits(hidden_MC).float() / temperature).log_softmax(-1)
    logp = logp_MV.gather(1, batch.target_M[:, None]).squeeze(1)
    loss(logp, slice(0, len(logp))).backward()
    return logp.detach()


def trl_head(model, batch, temperature, loss):
    """TRL's chunked head on the same hidden states."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as VOCABULARY_CHUNK
    hidden_MC = model(batch.ids_N, batch.positions_N, batch.attend)[batch.predictor_M]
    logp = ChunkedLogProbFunction.apply(hidden_MC, model.head_weight, None, batch.target_M,
                                        temperature, VOCABULARY_CHUNK, None, 1.0, ())[0]
    loss(logp, slice(0, len(logp))).backward()
    return logp.detach()
