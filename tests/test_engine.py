"""What keeps the devices busy: nothing is read from them inside a phase. And how attention is computed."""

import threading
import types
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm
from small_run import learn, silent, small_config

from ddpo_jax.build import build, init_state
from ddpo_jax.errors import UserError
from ddpo_jax.models import attention
from ddpo_jax.models.attention import attend, choose_kernel
from ddpo_jax.models.layers import gelu
from ddpo_jax.models.stable_diffusion import load
from ddpo_jax.models.tokenizer import tokenize_all
from ddpo_jax.types import Algorithm, Frozen, Metrics, TrainState
from ddpo_jax.update import Update, compiled_aside, make_update


@pytest.fixture
def unread(monkeypatch):
    """A phase in which the main thread may read arrays by jax.device_get alone.

    JAX's own guard sees all of it on an accelerator, and nothing on CPU, whose arrays lie in the host's memory: there
    this sees numbers and lists that are made of an array, though not np.asarray.
    """
    inside, kind = [], type(jnp.zeros(1))
    value, device_get = kind._value, jax.device_get

    def watched(array):
        assert not inside or threading.current_thread() is not threading.main_thread(), "an array was read in a phase"
        return value.fget(array)

    def explicit(tree):
        outside, inside[:] = inside[:], []
        try:
            return device_get(tree)
        finally:
            inside[:] = outside

    @contextmanager
    def phase(name, total):
        inside.append(name)
        try:
            with jax.transfer_guard_device_to_host("disallow"):
                yield lambda count: None
        finally:
            inside.clear()

    monkeypatch.setattr(kind, "_value", property(watched))
    monkeypatch.setattr(jax, "device_get", explicit)
    return phase


@pytest.mark.parametrize("read", [float, int, bool, lambda x: x.tolist()])
def test_the_guard_sees_what_is_read(unread, read):
    array = jnp.ones(())
    with pytest.raises(AssertionError, match="read in a phase"), unread("update", 1):
        read(array + 1)
    with unread("update", 1):
        assert jax.device_get(array + 1) == 2
    assert read(array + 1)


def test_a_round_reads_nothing_inside_its_phases(small_folder, unread):
    """Compiled in a round before, as compiling reads constants. The pictures are read by the scorers' threads."""
    phases = [silent]
    run = build(small_config(small_folder, **{"sample.chunk_size": 4}), lambda *told: phases[-1](*told))
    state = init_state(run, seed=0, ema=False)
    update = make_update(run.algorithm, run.tuning, run.tx, ema_decay=0.0, layout=run.layout)
    for phase in (silent, unread):
        phases.append(phase)
        batch, _, _ = run.algorithm.collect(state.params, run.frozen, run.draw(0), state.carry, jax.random.key(1))
        state, history = learn(update, run.algorithm, state, run.frozen, batch, phase=phase)
        assert [scalars["skipped_in_a_row"] for scalars in history] == [0, 0]


def test_what_is_compiled_aside_is_so_once_and_tells_of_errors():
    calls = []

    def program(compiling):
        def call(x):
            raise AssertionError("it was called")

        call.lower = lambda x: calls.append(x) or types.SimpleNamespace(compile=compiling)
        return call

    prepare = compiled_aside(program(lambda: 1))
    prepare(2)()
    prepare(3)()
    assert calls == [2]
    wait = compiled_aside(program(lambda: 1 / 0))(4)
    with pytest.raises(ZeroDivisionError):
        wait()


def test_scalars_are_read_once_the_next_step_is_under_way(monkeypatch):
    told, device_get = [], jax.device_get

    def tell(name, result):
        told.append(name)
        return result

    def apply(state, total):
        number = told.count("apply")
        return tell("apply", (state, {"skipped_in_a_row": jnp.zeros(()), "number": jnp.float32(number)}))

    update = Update(
        zero=lambda *inputs: 0,
        accumulate=lambda *inputs: tell("accumulate", (0, Metrics({}, {}))),
        apply=apply,
        prepare=lambda *inputs: lambda: None,
    )
    monkeypatch.setattr(jax, "device_get", lambda tree: tell("read", device_get(tree)))
    algorithm = Algorithm(*[None] * len(Algorithm._fields))._replace(slices=lambda batch: np.ones((3, 8), bool))
    state = TrainState(*[None] * len(TrainState._fields))
    _, history = learn(update, algorithm, state, Frozen(*[None] * 5), None, num_updates=3)
    step = ["accumulate", "apply"]
    assert told == [*step, *step, "read", *step, "read", "read"]
    assert [scalars["number"] for scalars in history] == [0, 1, 2]


@pytest.mark.parametrize("kernel", ["chunked", "stepwise"])
@pytest.mark.parametrize(("queries", "keys", "limit"), [(12, 12, 40), (12, 7, 10), (7, 12, 1), (7, 12, 10**6)])
def test_attention_is_the_same_by_each_kernel(monkeypatch, kernel, queries, keys, limit):
    """Values and gradients; whatever chunks the queries can be cut into."""
    monkeypatch.setattr(attention, "CHUNK_PRODUCTS", limit)
    rng = np.random.default_rng(0)
    q, k, v, weight = (jnp.asarray(rng.normal(size=(2, n, 16)), jnp.float32) for n in (queries, keys, keys, queries))

    def total(kernel):
        return jax.jit(
            jax.value_and_grad(lambda q, k, v: jnp.sum(weight * attend(q, k, v, num_heads=2, kernel=kernel)), (0, 1, 2))
        )(q, k, v)

    for found, expected in zip(*map(jax.tree.leaves, (total(kernel), total("xla"))), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", ["chunked", "stepwise"])
def test_the_denoiser_attends_as_it_is_told(monkeypatch, small_folder, kernel):
    monkeypatch.setattr(attention, "CHUNK_PRODUCTS", 64)

    def predict(name):
        model, pretrained = load(str(small_folder), dtype=jnp.float32, attention=name)
        cond = model.encode_text(pretrained.text, jnp.asarray(tokenize_all(pretrained.tokenizers, ["a fox"])))
        x_t = jax.random.normal(jax.random.key(0), (1, *model.latent_shape))
        traced = jax.jit(lambda params: model.predict(params, x_t, jnp.full(1, 401.0), cond)).trace(pretrained.denoiser)
        return traced.lower().compile()(pretrained.denoiser), str(traced.jaxpr)

    found, told = predict(kernel)
    expected, plain = predict("xla")
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    operation = {"chunked": "scan[", "stepwise": "optimization_barrier"}[kernel]
    assert told.count(operation) > plain.count(operation)


def test_chunks_gradients_are_summed_in_float32(monkeypatch):
    """In bfloat16 the sum over many chunks would lose most of what each adds."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(1, n, 8)), jnp.bfloat16) for n in (512, 4, 4))

    def gradient(v, kernel, dtype):
        inputs = (x.astype(dtype) for x in (q, k, v))
        return jnp.sum(attend(*inputs, num_heads=1, kernel=kernel).astype(jnp.float32))

    exact = jax.grad(gradient)(v.astype(jnp.float32), "xla", jnp.float32)
    monkeypatch.setattr(attention, "CHUNK_PRODUCTS", 4)  # one query
    found = jax.grad(gradient)(v, "chunked", jnp.bfloat16)
    np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=0.01)


@pytest.mark.parametrize(
    ("platform", "dtype", "kernel"),
    [
        ("cpu", jnp.bfloat16, "stepwise"),
        ("tpu", jnp.bfloat16, "chunked"),
        ("gpu", jnp.float32, "chunked"),
        ("gpu", jnp.bfloat16, "chunked"),  # this machine has no cuDNN
    ],
)
def test_the_kernel_that_is_chosen(monkeypatch, platform, dtype, kernel):
    monkeypatch.setattr(jax, "default_backend", lambda: platform)
    assert choose_kernel("auto", dtype=dtype) == kernel
    with pytest.raises(UserError, match=f"attention='cudnn' in .* on {platform}: .*; set 'auto'"):
        choose_kernel("cudnn", dtype=dtype)


def test_cudnn_is_chosen_where_it_can_be_had(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(attention, "_cudnn_fault", lambda platform, dtype: "")
    assert choose_kernel("auto", dtype=jnp.bfloat16) == choose_kernel("cudnn", dtype=jnp.bfloat16) == "cudnn"


def test_attention_kernels():
    """Which there is follows from the machine and the dtype; which is taken, from a head's width."""
    assert choose_kernel("xla", dtype=jnp.float32) == "xla"
    for name, message in {"cudnn": "bfloat16 on cpu: expected an NVIDIA GPU", "flash": "expected 'auto'"}.items():
        with pytest.raises(UserError, match=message):
            choose_kernel(name, dtype=jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (2, 5, 320))
    narrow, wide = 8, 2  # heads of 40, and of 160
    np.testing.assert_array_equal(attend(x, x, x, num_heads=wide, kernel="cudnn"), attend(x, x, x, num_heads=wide))
    with pytest.raises(RuntimeError, match="cuDNN"):
        attend(x, x, x, num_heads=narrow, kernel="cudnn")


def test_gelu_keeps_its_digits_in_bfloat16():
    x = jnp.linspace(-4, 4, 801, dtype=jnp.bfloat16)
    expected = np.asarray(x, np.float64) * norm.cdf(np.asarray(x, np.float64))
    np.testing.assert_allclose(jax.jit(gelu)(x).astype(jnp.float32), expected, rtol=0.01)
