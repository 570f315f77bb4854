"""The fast sampler: rows in flight against a key/value cache, CUDA graphs, refilled places.

What it does    `Sampler.run` gives the completions that rollout.sample_slowly defines. Each prompt
                runs through the model once, and its keys and values are stored once for its whole
                group (`CachedAttention`); rows that have ended make room for rows that wait; on a
                CPU large weights are reordered for products with few rows (onednn.py); on CUDA a
                step is captured once for each size and replayed.
Not here        how a token is chosen, and the numbers behind it: rollout.py hands both in.
Where to fork   `CachedAttention` is the layout of the cache (FlashCache in fast_decode.py on CUDA),
                `Sampler.run` the order of work.

A *row* is a completion in flight; a *place* is where the cache keeps a prompt; a *seat* is one of
the G seats beside a place. Two prompts with two completions each, after row 1 has ended and the
rows have closed ranks (3 rows, 2 places):

    place 0: prompt A        seat 0: row 0  A, sample 0      seat 1: empty   (A, sample 1 ended)
    place 1: prompt B        seat 2: row 1  B, sample 0      seat 3: row 2   B, sample 1

    seat_R = [0, 2, 3]   seat of each row            seat = place · G + sample
    row_S  = [0, *, 1, 2]   row on each seat         (* any row: nobody reads what it gives)

Axis letters: R rows in flight, S seats, P places for prompts, G completions per prompt, N flat
tokens, T positions (J those of keys), V vocabulary, H query heads, K key/value heads, h = H/K query
heads that share one, D head width, U uniform numbers for one token.
"""
from collections import deque
from functools import partial
from types import SimpleNamespace

import torch

from model import SharedPromptAttention
from plumbing.fast_decode import FlashCache, decode, fast_works
from plumbing.onednn import reorder_weights
from plumbing.packed import segments

FAST = True  # on CUDA in bf16: the step of fast_decode.py; off once its check has failed
FAST_ROWS = 16  # chosen: with fewer, sampling takes less time than compiling
LOOK_EVERY = 4  # chosen: decode steps between looks at which rows have finished
REFILL = 16  # chosen: 1/16 of the places are filled together, so that new prompts are, too
LENGTH_STEP = 32  # chosen, on CUDA: graphs are captured for cached lengths of 32, 64, 96, … tokens


# ------------------------------------------------------------------ the cache

def scores(q, k):
    """q·k in fp32 (TF32 with --dtype tf32): (…, …, S, D), (…, …, D, T) -> (…, …, S, T).

    Qwen2.5 has keys so large that scores rounded to bf16 would be another policy than the
    trainer's.
    """
    if q.dtype == torch.float32:
        return q @ k
    if q.is_cuda:
        flat = torch.bmm(q.flatten(0, 1), k.flatten(0, 1), out_dtype=torch.float32)
        return flat.unflatten(0, q.shape[:2])
    return q.float() @ k.float()


class CachedAttention:
    """One new token for each of R rows against the cache; a prompt is stored once for its group.

    prompt_k, prompt_v: per layer (P, K, D, T) and (P, K, T, D), P places for prompts; own_k,
    own_v: (R, K, D, T) and (R, K, T, D), T = max_new_tokens. Keys lie as their product reads them.
    To meet a prompt's keys without copying the keys for every row, the queries of the G seats
    beside the prompt are stacked into one long query (`by_prompt`), and what comes out is taken
    apart again (`by_row`). Each of the two is one selection; `look_at` makes its indices once a
    step, for all layers.
    """

    def __init__(self, model, n_rows, n_prompts, group_size, longest_prompt, max_new_tokens):
        c, self.G = model.config, group_size

        def zeros(*shape):  # not empty: a weight of 0 times a NaN would be NaN
            return [torch.zeros(shape, dtype=model.compute_dtype, device=model.device)
                    for _ in range(c["num_hidden_layers"])]
        K, D = c["num_key_value_heads"], c["head_dim"]
        self.prompt_k = zeros(n_prompts, K, D, longest_prompt)
        self.prompt_v = zeros(n_prompts, K, longest_prompt, D)
        self.own_k = zeros(n_rows, K, D, max_new_tokens)
        self.own_v = zeros(n_rows, K, max_new_tokens, D)
        self.mask_PT = torch.zeros(n_prompts, longest_prompt, device=model.device)
        self.row_S = torch.zeros(n_prompts * group_size, dtype=torch.int64, device=model.device)
        self.n_places, self.longest = n_prompts, longest_prompt
        self.n_prompts = n_prompts  # places in use, the first ones

    def seat(self, seat_R, row_n):
        """Rows row_n now sit where seat_R says."""
        self.row_S.clamp_(max=len(seat_R) - 1)
        self.row_S[seat_R[row_n]] = row_n

    def look_at(self, seat_R, t_R, n_own):
        """Before each step: t_R tokens of a row are cached, in each running row fewer than n_own.
        """
        self.t_R, self.n_own = t_R, n_own
        self.row_R = torch.arange(len(t_R), device=t_R.device)
        K, G, P = self.own_k[0].shape[1], self.G, self.n_prompts
        k_K = torch.arange(K, device=t_R.device)
        row_PG = self.row_S[:P * G].view(P, G)
        place_R, sample_R = seat_R // G, seat_R % G
        self.row_and_head_PKG = (row_PG[:, None] * K + k_K[:, None]).flatten()
        self.place_head_sample_RK = ((place_R[:, None] * K + k_K) * G + sample_R[:, None]).flatten()
        future_RT = torch.arange(n_own, device=t_R.device) > t_R[:, None]
        own_RT = torch.zeros(future_RT.shape, device=t_R.device).masked_fill_(future_RT, -torch.inf)
        mask_RT = self.mask_PT.index_select(0, place_R)
        self.mask_R11J = torch.cat([mask_RT, own_RT], 1)[:, None, None]

    def by_prompt(self, x_RKhX):
        """(R, K, h, X) -> (P, K, G·h, X), the seats beside one prompt together."""
        _, K, h, X = x_RKhX.shape
        x = x_RKhX.reshape(-1, h * X).index_select(0, self.row_and_head_PKG)
        return x.view(self.n_prompts, K, self.G * h, X)

    def by_row(self, x_PKSX, h):
        """The way back: (P, K, G·h, X) -> (R, K, h, X)."""
        _, K, _, X = x_PKSX.shape
        x = x_PKSX.reshape(-1, h * X).index_select(0, self.place_head_sample_RK)
        return x.view(-1, K, h, X)

    def __call__(self, layer, q_RHD, k_RKD, v_RKD):
        (R, H, D), K, n_own = q_RHD.shape, k_RKD.shape[1], self.n_own
        own_k, own_v = self.own_k[layer], self.own_v[layer]
        own_k[self.row_R, :, :, self.t_R], own_v[self.row_R, :, self.t_R] = k_RKD, v_RKD
        own_k, own_v = own_k[:R, ..., :n_own], own_v[:R, :, :n_own]
        prompt_k = self.prompt_k[layer][:self.n_prompts]
        prompt_v = self.prompt_v[layer][:self.n_prompts]
        q = q_RHD.reshape(R, K, H // K, D)
        beside_prompt = self.by_row(scores(self.by_prompt(q), prompt_k), H // K)
        logit = torch.cat([beside_prompt, scores(q, own_k)], -1)
        weight = torch.add(self.mask_R11J, logit, alpha=D**-0.5).softmax(-1).to(q.dtype)
        w_prompt, w_own = weight[..., :-n_own], weight[..., -n_own:]
        out_prompt = self.by_row(self.by_prompt(w_prompt) @ prompt_v, H // K)
        return (w_own @ own_v + out_prompt).reshape(R, H, D)

    def store_prompts(self, places, length_n, keys, values):
        """Put prompts of these lengths (keys, values: per layer (n, K, T, D)) on these places.

        What follows a prompt's last token but one is hidden: the rows bring the last one along.
        """
        T, device = keys[0].shape[2], places.device
        for layer, (k_nKTD, v_nKTD) in enumerate(zip(keys, values)):
            self.prompt_k[layer][places, ..., :T] = k_nKTD.transpose(2, 3)
            self.prompt_v[layer][places, :, :T] = v_nKTD
        hidden_nT = torch.arange(self.mask_PT.shape[1], device=device) >= length_n[:, None] - 1
        mask_nT = torch.zeros(hidden_nT.shape, device=device).masked_fill_(hidden_nT, -torch.inf)
        self.mask_PT[places] = mask_nT

    def keep(self, row_n, n_own, prompt_n):
        """Move these rows and these prompts to the front; the others are gone."""
        for k, v in zip(self.own_k, self.own_v):
            k[:len(row_n), ..., :n_own] = k[..., :n_own].index_select(0, row_n)
            v[:len(row_n), :, :n_own] = v[:, :, :n_own].index_select(0, row_n)
        self.n_prompts = len(prompt_n)
        for x in (*self.prompt_k, *self.prompt_v, self.mask_PT):
            x[:self.n_prompts] = x.index_select(0, prompt_n)


# ------------------------------------------------------------------ rows in flight

def places_for(n_prompts, group_size, max_rows):
    """How many completions and how many prompts a Sampler has room for at once: (rows, prompts)."""
    n_rows = min(max_rows, n_prompts * group_size)
    return n_rows, min(n_prompts, 2 * -(-n_rows // group_size))


def sampler_for(model, prompts, group_size, max_new_tokens, max_rows, n_draws, choose):
    """A Sampler with room for this work, and the present weights of `model`.

    On CUDA the model keeps its last two samplers, one for training and one for validation, since
    their captured graphs serve the next call of their size. The samplers' weights are refreshed in
    place. choose(model, hidden_RC, u_RU, fast) -> token_R, logp_R: a functools.partial with its
    settings as keywords; samplers are told apart by these.
    """
    longest = max(map(len, prompts), default=1)
    settings = (*places_for(len(prompts), group_size, max_rows), group_size, max_new_tokens,
                n_draws, choose)
    if not model.on_cuda:
        return Sampler(model.for_sampling(), longest, *settings)
    key = (Sampler, *settings[:-1], *sorted(choose.keywords.items()), model.compute_dtype,
           model.n_real_ids, *model.stop_ids)
    kept = model.kept_samplers
    if key not in kept or kept[key].attention.longest < longest:
        kept.pop(key, None)
        while len(kept) > 1:
            kept.pop(next(iter(kept)))
        twin = next((sampler.model for sampler in kept.values()
                     if sampler.model.compute_dtype == model.compute_dtype), None)
        room = -(-longest // 128) * 128  # chosen: few prompts of a set are longer than its first
        kept[key] = Sampler(twin or model.for_sampling(), room, *settings)
    for twin, master in zip(kept[key].model.parameters(), model.parameters(), strict=True):
        if twin.data_ptr() != master.data_ptr():
            twin.copy_(master)
    return kept[key]


def prefill(model, prompts):
    """Run all prompts once: their lengths, keys and values, both per layer (P, K, T, D)."""
    attention = SharedPromptAttention([len(p) for p in prompts], [[] for _ in prompts],
                                      model.device)
    padded_PT = attention.prompts.query_BT  # repeats the last token: no garbage in the padding
    keys, values = [], []

    def attend(layer, q_NHD, k_NKD, v_NKD):
        for store, x_NKD in ((keys, k_NKD), (values, v_NKD)):
            x = x_NKD.index_select(0, padded_PT.flatten()).unflatten(0, padded_PT.shape)
            store.append(x.transpose(1, 2))
        return attention(layer, q_NHD, k_NKD, v_NKD)

    ids_N = torch.tensor([i for p in prompts for i in p], device=model.device)
    _, positions_N = segments([len(p) for p in prompts])
    model(ids_N, positions_N.to(model.device), attend)
    return attention.prompts.length_B, keys, values


class Sampler:
    """Rows that run together, each on a place in tensors of fixed shape.

    `step` gives every row its next token and never waits for the device. Every few steps `run`
    takes the rows that have ended away, gives their places to rows that wait and, once none waits,
    moves the rest together. A row begins with its prompt's last token, the tokens before it are
    computed once for its group.
    """

    def __init__(self, model, longest_prompt, n_rows, n_prompts, group_size, max_new_tokens,
                 n_draws, choose):
        self.model, self.G, self.T, self.choose = model, group_size, max_new_tokens, choose
        reorder_weights(model)
        global FAST
        fast = (FAST and model.on_cuda and model.compute_dtype == torch.bfloat16
                and n_rows >= FAST_ROWS)
        if fast and not fast_works(model, CachedAttention):
            fast = FAST = False
        self.fast = fast
        self.attention = (FlashCache if fast else CachedAttention)(
            model, n_rows, n_prompts, group_size, longest_prompt, max_new_tokens)
        self.forward = partial(decode, model) if fast else model
        self.fewest = 2 if fast else 1  # rows, prompts: for one, all would be compiled again
        self.stop_ids = torch.tensor(model.stop_ids, device=model.device)
        self.places = torch.arange(n_rows, device=model.device)
        self.graphs = {}  # of step, on CUDA; they share one pool of memory and one stream
        if model.on_cuda:
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

        def zeros(*shape, dtype=torch.int64):
            return torch.zeros(n_rows, *shape, dtype=dtype, device=model.device)
        self.all_rows = {
            "token": zeros(),    # the last one: of the prompt, then drawn
            "start": zeros(),    # its position at first
            "length": zeros(),   # tokens drawn so far
            "running": zeros(dtype=torch.bool), "finished": zeros(dtype=torch.bool),
            "seat": zeros(),     # in attention
            "u": zeros(max_new_tokens, n_draws, dtype=torch.float32),  # for every draw
            "tokens": zeros(max_new_tokens + 1),  # drawn; the last column is for rows that ended
            "logps": zeros(max_new_tokens + 1, dtype=torch.float32)}

    def step(self, n_own):
        """The next token of every row. n_own: more than the `length` of any row that runs."""
        r = self.rows
        t_R = r.length.clamp(max=self.T - 1)  # one that has ended goes on; nobody reads it
        self.attention.look_at(r.seat, t_R, n_own)
        hidden_RC = self.forward(r.token, r.start + r.length, self.attention)
        u_RU = r.u[self.places[:len(t_R)], t_R]
        token_R, logp_R = self.choose(self.model, hidden_RC, u_RU, self.fast)
        column_R1 = torch.where(r.running, r.length, self.T)[:, None]
        r.tokens.scatter_(1, column_R1, token_R[:, None])
        r.logps.scatter_(1, column_R1, logp_R[:, None])
        r.token.copy_(token_R)
        r.length.add_(r.running)
        r.finished.logical_or_((token_R[:, None] == self.stop_ids).any(1) & r.running)
        r.running.logical_and_(~r.finished & (r.length < self.T))

    def step_or_replay(self, n_own):
        """`step`; on CUDA captured once for each size as a graph, which replays without the host.

        Before the capture the step runs once, so that every kernel is loaded; then the rows are
        put back (what it cached is computed again). The stream is the sampler's own: with a graph,
        torch also frees cuBLAS's workspace of the stream that it was captured on, which no graph
        of another sampler may still use (issue 193402 of pytorch).
        """
        if not self.places.is_cuda:
            return self.step(n_own)
        n_own = min(-(-n_own // LENGTH_STEP) * LENGTH_STEP, self.T)
        size = len(self.rows.token), n_own, self.attention.n_prompts
        if size not in self.graphs:
            before = {name: x.clone() for name, x in vars(self.rows).items()}
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step(n_own)
            torch.cuda.current_stream().wait_stream(self.stream)
            for name, x in before.items():
                getattr(self.rows, name).copy_(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
                self.step(n_own)
            self.graphs[size] = graph
        self.graphs[size].replay()

    def run(self, prompts, keys, uniforms, bar):
        """All completions of these prompts, group by group: (ids, logps, finished) of each.

        keys: one int a prompt. uniforms(key_n, sample_n): (n, T, n_draws), the uniform numbers that
        `choose` gets for the n rows with these prompts' keys and these places in their groups.
        bar: tqdm's, over T tokens for every completion; one that ends early gives up the rest.
        """
        self.resize(len(self.places))
        self.attention.n_prompts = self.attention.n_places
        rows = [(p, g) for p in range(len(prompts)) for g in range(self.G)]
        self.waiting, self.row_at, done = deque(rows), {}, {}  # row_at: place -> (prompt, sample)
        self.free = list(range(len(self.places)))[::-1]
        self.place_of, self.n_left = {}, {}  # prompt -> its place, its rows that have not ended
        self.free_prompts = list(range(self.attention.n_prompts))[::-1]
        lengths = [0] * len(self.places)
        while self.waiting or self.row_at:
            if self.waiting and len(self.free) >= len(self.places) / REFILL:
                self.admit(prompts, keys, uniforms, lengths)
            running = [lengths[i] for i in self.row_at]
            n_steps = min(LOOK_EVERY, self.T - min(running))
            for _ in range(n_steps):
                self.step_or_replay(min(max(running) + n_steps, self.T))
            before, lengths = lengths, self.rows.length.tolist()
            assert all(lengths[i] > before[i] for i in self.row_at), (before, lengths)
            self.collect(done, lengths)
            if self.row_at and not self.waiting:
                lengths = self.close_ranks(lengths)
            bar.update(len(done) * self.T + sum(lengths[i] for i in self.row_at) - bar.n)
        return [done[row] for row in rows]

    def admit(self, prompts, keys, uniforms, lengths):
        """Give free places to rows that wait, and compute the prompts that are new."""
        rows, new = [], []
        while self.waiting and self.free:
            p, g = self.waiting[0]
            if p not in self.place_of:
                if not self.free_prompts:
                    break
                self.place_of[p], self.n_left[p] = self.free_prompts.pop(), self.G
                new.append(p)
            i = self.free.pop()
            self.row_at[i], lengths[i] = self.waiting.popleft(), 0
            rows.append((i, keys[p], g, self.seat_of(p, g), prompts[p][-1], len(prompts[p]) - 1))
        if not rows:  # rows are free, but every place for a prompt is taken
            return
        if new:
            self.attention.store_prompts(self.tensor([self.place_of[p] for p in new]),
                                         *prefill(self.model, [prompts[p] for p in new]))
        at, key, sample_n, seat, token, start = self.tensor(rows).unbind(1)
        for name, x in dict(token=token, start=start, length=0, running=True, finished=False,
                            seat=seat, u=uniforms(key, sample_n)).items():
            getattr(self.rows, name)[at] = x
        self.attention.seat(self.rows.seat, at)

    def collect(self, done, lengths):
        """Take away the rows that have ended; their places are free."""
        running = self.rows.running.tolist()
        ended = [i for i in self.row_at if not running[i]]
        if not ended:
            return
        results = (x.index_select(0, self.tensor(ended)).tolist()
                   for x in (self.rows.tokens, self.rows.logps, self.rows.finished))
        for i, ids, logps, finished in zip(ended, *results):
            p, g = self.row_at.pop(i)
            done[p, g] = ids[:lengths[i]], logps[:lengths[i]], finished
            self.free.append(i)
            self.n_left[p] -= 1
            if self.n_left[p] == 0:
                self.free_prompts.append(self.place_of.pop(p))

    def close_ranks(self, lengths):
        """Move the rows that run, and their prompts, to the first places, once they need fewer."""
        n = max(size_for(len(self.row_at)), self.fewest)
        if n >= len(self.rows.token):
            return lengths
        stay = padded(sorted(self.row_at), n)
        prompts = sorted(self.place_of.values())
        prompts = padded(prompts, min(max(size_for(len(prompts)), self.fewest),
                                      self.attention.n_prompts))
        self.attention.keep(self.tensor(stay), max(lengths), self.tensor(prompts))
        for x in self.all_rows.values():
            x[:n] = x.index_select(0, self.tensor(stay))
        self.resize(n)
        self.row_at = {i: self.row_at[old] for i, old in enumerate(stay) if old in self.row_at}
        self.place_of = {p: prompts.index(place) for p, place in self.place_of.items()}
        self.rows.seat[:len(self.row_at)] = self.tensor(
            [self.seat_of(*row) for row in self.row_at.values()])
        self.rows.seat[len(self.row_at):] = 0
        self.attention.seat(self.rows.seat, self.places[:len(self.row_at)])
        return [lengths[old] for old in stay]

    def resize(self, n):
        """Go on with the first n places."""
        self.rows = SimpleNamespace(**{name: x[:n] for name, x in self.all_rows.items()})

    def seat_of(self, p, g):
        return self.place_of[p] * self.G + g

    def tensor(self, integers):
        return torch.tensor(integers, dtype=torch.int64, device=self.places.device)


def padded(places, n):
    """These places, and others after them so that there are n: padded([5, 2], 4) = [5, 2, 0, 1]."""
    return places + [i for i in range(n) if i not in places][:n - len(places)]


def size_for(n):
    """The smallest of 1, 2, 3, 4, 6, 8, 12, 16, … (2ⁱ and 3·2ⁱ) that holds n."""
    power = 1 << (n - 1).bit_length()
    return power // 4 * 3 if power >= 4 and n <= power // 4 * 3 else power
