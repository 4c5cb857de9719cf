"""The formula of each variant, once more: from its docstring and the paper, in NumPy, without a line of the package.

A formula is a function of `Given`, which has the names of the papers: `W (d_out, d_in)`, `b (d_out,)`, rows `x`, and
the adapter's tensors, `lora_A` as `A`. It forms whatever matrix the docstring speaks of. What is a constant for
autograd is read from `fixed`, so that finite differences give the gradient that training takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tests.variants.formula_parts import Array, Given, block_diagonal, columns, elu, rows, scale_of, skew, softmax

FORMULAS: dict[str, Callable[[Given], Array]] = {}


def formula(function: Callable[[Given], Array]) -> Callable[[Given], Array]:
    """Note a formula under the name of its variant."""
    FORMULAS[function.__name__] = function
    return function


# Low-rank branches.


@formula
def LoRA(g: Given) -> Array:
    c = g.p.bias if g.cfg.bias else 0.0
    return g.y + scale_of(g.cfg) * (g.dropped @ (g.p.B @ g.p.A).T + c)


@formula
def EVA(g: Given) -> Array:
    return g.y + scale_of(g.cfg) * g.dropped @ (g.p.B @ g.p.A).T


@formula
def PiSSA(g: Given) -> Array:
    s = scale_of(g.cfg)
    return g.x @ (g.W - s * g.p.B0 @ g.p.A0).T + g.b + s * g.dropped @ (g.p.B @ g.p.A).T


FORMULAS["OLoRA"] = PiSSA  # the start differs


@formula
def DoRA(g: Given) -> Array:
    s, f = scale_of(g.cfg), g.fixed
    norms = rows(f.W + s * f.p.B @ f.p.A)
    return g.p.m / norms * (g.x @ g.W.T + s * g.dropped @ (g.p.B @ g.p.A).T) + g.b


@formula
def DeLoRA(g: Given) -> Array:
    a, b = np.maximum(rows(g.p.A), 1e-4), np.maximum(columns(g.p.B), 1e-4)
    return g.y + (g.dropped * g.p.wnorm) @ (g.p.B @ np.diag(g.p.__dict__["lambda"] / (g.cfg.r * a * b)) @ g.p.A).T


@formula
def AdaLoRA(g: Given) -> Array:
    return g.y + g.cfg.alpha / (g.cfg.r + 1e-5) * g.dropped @ (g.p.B @ np.diag(g.p.E) @ g.p.A).T


@formula
def LoRAXS(g: Given) -> Array:
    return g.y + g.cfg.alpha / g.cfg.r * g.dropped @ (g.p.B @ g.p.R @ g.p.A).T


@formula
def TinyLoRA(g: Given) -> Array:
    v = g.p.tinylora_v if g.cfg.tied else g.p.v
    return g.y + g.dropped @ (g.p.B @ sum(v[i] * g.p.P[i] for i in range(g.cfg.u)) @ g.p.A).T


@formula
def VeRA(g: Given) -> Array:
    (d_out, d_in), r = g.W.shape, g.cfg.r
    a, b = g.p.vera_A[:r, :d_in], g.p.vera_B[:d_out, :r]
    return g.y + g.p.lb * ((g.p.ld * (g.dropped @ a.T)) @ b.T)


@formula
def RandLoRA(g: Given) -> Array:
    d_in, r = g.W.shape[1], g.cfg.r
    m, larger = min(g.W.shape), max(g.W.shape)
    n = math.ceil(m / r)
    a = g.p.randlora_A[:r, :m]
    drawn = g.p.randlora_B[:larger, :n, :r].reshape(larger, n * r)
    update = np.zeros((larger, m))
    for j in range(n):  # column k of B_j is column k n + j of all that is drawn
        b = drawn[:, [k * n + j for k in range(r)]]
        update += b @ np.diag(g.p.__dict__["lambda"][:, j]) @ a @ np.diag(g.p.gamma[j])
    return g.y + g.cfg.alpha / r * g.dropped @ (update if m == d_in else update.T).T


@formula
def VBLoRA(g: Given) -> Array:
    def piece(logits: Array) -> Array:
        largest = np.argsort(-logits)[: g.cfg.topk]
        weights = softmax(logits[largest])
        return sum((w * g.p.vblora_bank[i] for w, i in zip(weights, largest, strict=True)), start=0 * weights[0])

    a = np.array([np.concatenate([piece(logits) for logits in row]) for row in g.p.logits_A])
    r = g.p.logits_B.shape[1]
    b = np.array([np.concatenate([piece(part[k]) for part in g.p.logits_B]) for k in range(r)]).T
    return g.y + g.dropped @ (b @ a).T


@formula
def GraLoRA(g: Given) -> Array:
    k, (d_out, d_in) = g.cfg.k, g.W.shape
    part, height, width = g.cfg.r // k, d_out // k, d_in // k
    d = np.zeros((d_out, d_in))
    for o in range(k):
        for i in range(k):
            a = g.p.A[i][:, o * part : (o + 1) * part]
            b = g.p.B[o][i * part : (i + 1) * part]
            d[o * height : (o + 1) * height, i * width : (i + 1) * width] = (a @ b).T
    if g.cfg.hybrid_r:
        d = d + g.p.hybrid_B @ g.p.hybrid_A
    return g.y + g.cfg.alpha / (g.cfg.r + g.cfg.hybrid_r) * g.dropped @ d.T


@formula
def MiSS(g: Given) -> Array:
    (d_out, d_in), r = g.W.shape, g.cfg.r
    if g.cfg.mode == "bat":
        update = np.zeros((d_out, d_in))
        for o in range(d_out // r):
            for i in range(d_in // r):
                place = slice(o * r, (o + 1) * r), slice(i * r, (i + 1) * r)
                update[place] = g.W[place] @ g.p.D[o] + g.p.D[o]
        return g.y + g.dropped @ update.T
    d = g.p.D if g.cfg.mode == "balance" else np.concatenate([g.p.D] * (d_out // g.cfg.mini_r), axis=1)
    blocks = np.zeros((len(g.x), r))
    for i in range(d_in):
        blocks[:, i % r] += g.dropped[:, i]
    return g.y + blocks @ d


# Updates that are as large as the weight.


@formula
def HiRA(g: Given) -> Array:
    return g.y + g.dropped @ (g.W * (g.p.B @ g.p.A)).T


def _with_update(g: Given, update: Array) -> Array:
    """Add an update of which `kept` says by what each output is multiplied, and then all of them."""
    y = g.x @ update.T
    return g.y + (y if g.kept is None else y * g.kept[0] * g.kept[1])


@formula
def LoHa(g: Given) -> Array:
    return _with_update(g, g.cfg.alpha / g.cfg.r * (g.p.B1 @ g.p.A1) * (g.p.B2 @ g.p.A2))


@formula
def LoKr(g: Given) -> Array:
    names = vars(g.p)
    w1 = g.p.W1 if "W1" in names else g.p.B1 @ g.p.A1
    w2 = g.p.W2 if "W2" in names else g.p.B2 @ g.p.A2
    return _with_update(g, g.cfg.alpha / g.cfg.r * np.kron(w1, w2))


@formula
def SHiRA(g: Given) -> Array:
    s = np.zeros(g.W.shape)
    for value, row, column in zip(g.p.S, *g.p.places.astype(int), strict=True):
        s[row, column] = value
    return g.x @ (g.W + s).T + g.b


@formula
def FourierFT(g: Given) -> Array:
    (d_out, d_in), c = g.W.shape, np.zeros(g.W.size)
    c[g.p.index.astype(int)] = g.p.spectrum
    c = c.reshape(d_out, d_in)
    left, right = (np.exp(2j * np.pi * np.outer(np.arange(n), np.arange(n)) / n) / n for n in (d_out, d_in))
    return g.y + g.x @ (g.cfg.scaling * (left @ c @ right).real).T


@formula
def WaveFT(g: Given) -> Array:
    (d_out, d_in), taps = g.W.shape, 2 * int(g.cfg.wavelet.lstrip("dbsym"))
    extra = taps - 2 if g.cfg.use_idwt else 0
    sides = [n + extra for n in (d_out, d_in)]
    sides = [n + n % 2 for n in sides] if g.cfg.use_idwt else sides
    c = np.zeros(sides[0] * sides[1])
    c[g.p.index.astype(int)] = g.p.spectrum
    c = c.reshape(sides)
    if g.cfg.use_idwt:
        low = g.p.filter
        high = np.array([(-1) ** k * low[taps - 1 - k] for k in range(taps)])

        def synthesis(n: int) -> list[Array]:
            """Return the matrices of an inverse level for the low-pass and for the high-pass half of n coefficients."""
            matrices = np.zeros((2, n - extra, n // 2))
            for matrix, taken in zip(matrices, (low, high), strict=True):
                for k in range(n // 2):
                    for t in range(taps):
                        if 0 <= 2 * k + t - extra < n - extra:
                            matrix[2 * k + t - extra, k] = taken[t]
            return list(matrices)

        # As in PEFT the right half has the high frequencies along rows, and the lower half those along columns.
        up, across = map(synthesis, sides)
        bands = [np.hsplit(half, 2) for half in np.vsplit(c, 2)]
        d = sum(up[j] @ bands[i][j] @ across[i].T for i in range(2) for j in range(2))
        c = np.asarray(d)[:d_out, :d_in]
    return g.y + g.x @ (g.cfg.scaling * c).T


@formula
def C3A(g: Given) -> Array:
    kernel, size = g.p.c3a_kernel, g.cfg.block_size
    c = np.block([[np.array([np.roll(k, j) for j in range(size)]) for k in row] for row in kernel])
    return g.y + g.x @ c.T / g.W.shape[1]


@formula
def GLoRA(g: Given) -> Array:
    def value(name: str, form: str, shape: tuple[int, ...]) -> Array:
        names = vars(g.p)
        if form == "none":
            return np.zeros(shape)
        v = names[f"{name}d"] @ names[f"{name}u"] if form == "lora" else names[name]
        return v + np.zeros(shape)

    d_out, d_in = g.W.shape
    a, b = (value(name, g.cfg.weight_form, (d_out, d_in)) for name in "AB")
    c = value("C", g.cfg.coupling_form, (d_in, 1))
    d, e = (value(name, g.cfg.bias_form, (d_out,)) for name in "DE")
    return g.x @ (g.W + g.W * a + b).T + g.b + g.b * d + e + (g.W @ c)[:, 0]


# Turned and gated inputs and outputs.


@formula
def HRA(g: Given) -> Array:
    d_in = g.W.shape[1]
    turn = np.eye(d_in)
    done: list[Array] = []
    for u in g.p.U:
        if g.cfg.orthogonal:
            for v in done:
                u = u - (u @ v) * v
        v = u / np.sqrt(u @ u)
        done.append(v)
        turn = turn @ (np.eye(d_in) - 2 * np.outer(v, v))
    return g.x @ (g.W @ turn).T + g.b


@formula
def OFT(g: Given) -> Array:
    d_in = g.W.shape[1]
    size = d_in // g.cfg.blocks if g.cfg.blocks else g.cfg.block_size

    def block(upper: Array, upper_fixed: Array) -> Array:
        q, identity = skew(upper, size), np.eye(size)
        if g.cfg.coft:
            length, bound = np.sqrt((skew(upper_fixed, size) ** 2).sum()), g.cfg.eps / math.sqrt(len(g.p.oft_R))
            if length > bound:  # what is cut off is a constant
                q = q + skew(upper_fixed, size) * (bound / length - 1)
        if g.cfg.use_cayley_neumann:
            return identity - 2 * q + 2 * q @ q - 2 * q @ q @ q + q @ q @ q @ q
        return np.linalg.inv(identity - q) @ (identity + q)

    blocks = [block(*pair) for pair in zip(g.p.oft_R, g.fixed.p.oft_R, strict=True)]
    turn = block_diagonal(blocks * (d_in // size) if g.cfg.block_share else blocks)
    return g.x @ (g.W @ turn).T + g.b


@formula
def BOFT(g: Given) -> Array:
    d_in, trained = g.W.shape[1], g.p.boft_R
    m, count, size = trained.shape[:3]
    half = size // 2
    turn = np.eye(d_in)
    for i in range(m):
        factor = np.eye(d_in)
        firsts = [j for j in range(d_in // half) if not j & 2**i] if m > 1 else range(0, 2 * count, 2)
        for k, j in enumerate(firsts):
            apart = 2**i if m > 1 else 1
            places = [*range(j * half, (j + 1) * half), *range((j + apart) * half, (j + apart + 1) * half)]
            q = (trained[i, k] - trained[i, k].T) / 2
            rotation = np.linalg.inv(np.eye(size) - q) @ (np.eye(size) + q)
            if g.kept is None or g.kept[i, k]:
                factor[np.ix_(places, places)] = rotation
        turn = turn @ factor
    return g.p.boft_s * (g.x @ (g.W @ turn).T) + g.b


@formula
def IA3(g: Given) -> Array:
    gates_input = bool(g.cfg.feedforward_names)
    return (g.x * g.p.g) @ g.W.T + g.b if gates_input else g.p.g * g.y


@formula
def RoAd(g: Given) -> Array:
    half, per_pair = g.cfg.group_size // 2, {"road_1": 1, "road_2": 2, "road_4": 4}[g.cfg.kind]
    y, result = g.y, np.empty_like(g.y)
    for group in range(y.shape[1] // (2 * half)):
        for j in range(half):
            first = group * 2 * half + j
            u, v = y[:, first], y[:, first + half]
            at = [(group * per_pair + k) * half + j for k in range(per_pair)]
            t, a = g.p.road_theta[at], g.p.road_alpha[at]
            one, two, three, four = {1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 4: (0, 2, 3, 1)}[per_pair]
            result[:, first] = a[one] * np.cos(t[one]) * u - a[two] * np.sin(t[two]) * v
            result[:, first + half] = a[three] * np.sin(t[three]) * u + a[four] * np.cos(t[four]) * v
    return result


@formula
def PSOFT(g: Given) -> Array:
    r = g.cfg.r
    identity = np.eye(r)
    q = skew(g.p.R, r) if g.cfg.orthogonal else None
    if q is None:
        turn = g.p.R
    elif g.cfg.use_cayley_neumann:
        turn = identity + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
    else:
        turn = (identity + q) @ np.linalg.inv(identity - q)
    u = vars(g.p)["in"] if g.cfg.scale_in else np.ones(r)
    v = g.p.out if g.cfg.scale_out else np.ones(r)
    return g.y + g.dropped @ (g.p.B @ (np.diag(v) @ turn @ np.diag(u) - identity) @ g.p.A).T


# What the weight does in some directions.


@formula
def AntiPaSTO(g: Given) -> Array:
    size = g.cfg.block_size
    largest = math.tan(g.cfg.max_rotation_angle / 2)  # a block turns by twice the arc tangent of an entry

    def turned(basis: Array) -> Array:
        blocks = []
        for upper in g.p.rot_T:
            x = skew(largest * np.tanh(upper / (4 * largest)), size)
            blocks.append(np.linalg.inv(np.eye(size) - x) @ (np.eye(size) + x))
        return block_diagonal(blocks) @ basis

    u = turned(g.p.U.T).T if g.cfg.rotate_basis == "U" else g.p.U
    vh = turned(g.p.Vh) if g.cfg.rotate_basis == "V" else g.p.Vh
    residual = g.W - g.p.U @ np.diag(g.p.S) @ g.p.Vh
    return g.x @ (residual + u @ np.diag(g.p.S + g.p.delta_s) @ vh).T + g.b


def _gains(g: Given) -> Array:
    trained = np.minimum(g.p.g, 0) if g.cfg.suppress_only else g.p.g
    return elu(g.p.coefficient * trained)


@formula
def AntiPaSTOGain(g: Given) -> Array:
    return g.y + g.x @ (g.p.U @ np.diag(g.p.S * _gains(g)) @ g.p.P).T


@formula
def AntiPaSTOArrow(g: Given) -> Array:
    r, size = len(g.p.S), len(g.p.M)
    core = np.zeros((r, r))
    core[:size, :size] = g.p.coefficient * g.p.M
    if size < r:
        core[size:, size:] = np.diag(_gains(g))
    return g.y + g.x @ (g.p.U @ core @ np.diag(g.p.S) @ g.p.P).T


@formula
def AntiPaSTODPLR(g: Given) -> Array:
    core = np.diag(g.p.S * _gains(g)) + g.p.coefficient * g.p.B @ g.p.A
    return g.y + g.x @ (g.p.U @ core @ g.p.P).T


@formula
def AntiPaSTOAblate(g: Given) -> Array:
    done: list[Array] = []
    for q in g.p.q.T:
        for v in done:
            q = q - (q @ v) * v
        done.append(q / np.sqrt(q @ q))
    q = np.array(done).T
    taken = q @ np.diag(np.clip(g.p.alpha, 0, 1)) @ q.T
    return g.y - g.p.coefficient * g.x @ (g.p.U @ taken @ np.diag(g.p.S) @ g.p.P).T


# Tensors in place of the frozen ones.


@formula
def Full(g: Given) -> Array:
    names = vars(g.p)
    return g.x @ names.get("weight", g.W).T + names.get("bias", g.b)


@formula
def TrainableTokens(g: Given) -> Array:
    """Of an embedding `W (width, ids)`, whose inputs are the rows of the identity; or of a head `W (ids, width)`."""
    w = g.W.copy()
    for token, row in zip(g.p.ids.astype(int), g.p.tokens, strict=True):
        if g.cfg.target_kinds == ("embedding",):
            w[:, token] = row
        else:
            w[token] = row
    return g.x @ w.T + g.b
