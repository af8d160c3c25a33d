"""Counting from HLO text: matmuls of every backend, loops, collectives, memory traffic."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from microdit_jax.xla.hlo.collectives import module_path
from microdit_jax.xla.hlo.count import count
from microdit_jax.xla.hlo.text import parse


def module(body: str, more: str = "") -> str:
    return f"HloModule m\n\n{more}\nENTRY %main (a: f32[]) -> f32[] {{\n{body}\n}}\n"


# Lines as the compilers for H100 and v5e wrote them, but for names and lengths.
CUBLAS = """\
  %x = bf16[4096,1024]{1,0} parameter(0)
  %w = bf16[1024,512]{1,0} parameter(1)
  ROOT %y = (bf16[4096,512]{1,0}, s8[33554432]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", backend_config={"gemm_backend_config":\
{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"]}}}"""
CUDNN = """\
  %q = bf16[8,64,16,64]{3,2,1,0} parameter(0)
  %k = bf16[8,78,16,64]{3,2,1,0} parameter(1)
  ROOT %o = (bf16[8,16,64,64]{3,1,2,0}, u8[0]{0}) custom-call(%q, %k, %k), \
custom_call_target="__cudnn$fmhaSoftmax", backend_config={"cudnn_fmha_backend_config":\
{"intermediate_tensor_shape":{"element_type":"BF16","dimensions":["8","16","64","78"]}}}"""
# A matmul with a batch of 16: a window of 16 positions, of which each output meets one.
BATCHED = """\
  %a = bf16[16,256,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[16,64,128]{2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[16,256,128]{2,1,0:T(8,128)(2,1)} convolution(%a, %b), \
window={size=16 stride=15 pad=0_0 lhs_dilate=16}, dim_labels=0bf_0io->0bf"""
SPLASH = """\
  %s = s32[64]{0} parameter(0)
  %q = bf16[8,16,128,64]{3,2,1,0} parameter(1)
  %k = bf16[8,16,256,64]{3,2,1,0} parameter(2)
  ROOT %o = bf16[8,16,128,64]{3,2,1,0} custom-call(%s, %q, %k, %k), \
custom_call_target="tpu_custom_call", metadata={op_name="jit(f)/splash_mha_fwd_no_residuals"}"""


@pytest.mark.parametrize(
    "text, flops",
    [
        (CUBLAS, 2 * 4096 * 1024 * 512),
        (CUDNN, 2 * 2 * 8 * 16 * 64 * 78 * 64),
        (CUDNN.replace("Softmax", "SoftmaxBackward"), 5 * 2 * 8 * 16 * 64 * 78 * 64),
        (BATCHED, 2 * 16 * 256 * 64 * 128),
        (SPLASH, 2 * 2 * 8 * 16 * 128 * 256 * 64),
    ],
    ids=["cublas", "cudnn", "cudnn_backward", "tpu_batched", "splash"],
)
def test_matmuls(text, flops):
    counts = count(module(text))
    assert counts.flops_by_type == {"bf16": flops}
    assert not counts.uncounted


def test_an_instruction_may_go_on_in_the_first_column():
    """Metadata of Pallas kernels does; the instructions after it were once lost."""
    kernel, after = (
        'custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={\n'
        '"xprof_metadata":"{\\"block_q\\": 128}"\n}}, ',
        "\n  ROOT %r = bf16[8,16,128,64]{3,2,1,0} copy(%o)",
    )
    body = SPLASH.replace("ROOT ", "").replace('custom_call_target="tpu_custom_call", ', kernel)
    found = parse(module(body + after))
    assert [i.name for i in found.entry] == ["s", "q", "k", "o", "r"]
    assert found.entry.root.opcode == "copy"
    counts = count(module(body + after))
    assert counts.flops == 2 * 2 * 8 * 16 * 128 * 256 * 64 and not counts.uncounted
    # Of another thread's computation the last line says more than its brace.
    other = (
        '%other (p: f32[]) -> f32[] {\n  ROOT %p = f32[] parameter(0)\n}, execution_thread="host"\n'
    )
    found = parse(module(body + after, other))
    assert {name: len(c.instructions) for name, c in found.computations.items()} == {
        "other": 1, "main": 5,
    }  # fmt: skip


def test_unknown_kernels_are_named():
    counts = count(module(SPLASH.replace("splash_mha_fwd_no_residuals", "mystery")))
    assert counts.uncounted == {"tpu_custom_call": 1} and counts.flops == 0
    signal = '%s = token[] custom-call(), custom_call_target="PrepareAsyncCallDone"'  # libtpu's
    assert not count(module(f"  ROOT {signal}")).uncounted


def test_a_compiled_program():
    """A loop's matmuls count as often as it runs; of a conditional, the heavier branch."""

    def program(x, w, flag):
        x = jax.lax.fori_loop(0, 7, lambda i, x: jnp.tanh(x @ w), x)
        return jax.lax.cond(flag, lambda x: x @ w @ w, lambda x: x, x)

    x, w = jnp.zeros((32, 48)), jnp.zeros((48, 48))
    text = jax.jit(program).lower(x, w, True).compile().as_text()
    assert count(text).flops == 9 * 2 * 32 * 48 * 48


def test_convolutions_as_xla_counts_them():
    """With padding, strides and groups, against XLA's own analysis."""
    for kwargs in (
        {"padding": "SAME", "window_strides": (1, 1)},
        {"padding": [(2, 1), (0, 3)], "window_strides": (2, 3), "rhs_dilation": (2, 1)},
        {"padding": [(1, 0), (2, 2)], "window_strides": (1, 1), "lhs_dilation": (2, 3)},
    ):

        def convolve(x, k, kwargs=kwargs):
            numbers = ("NHWC", "HWIO", "NHWC")
            return jax.lax.conv_general_dilated(x, k, dimension_numbers=numbers, **kwargs)

        lowered = jax.jit(convolve).lower(jnp.zeros((2, 9, 11, 3)), jnp.zeros((3, 3, 3, 5)))
        # XLA counts a multiply-add as two operations, as we do.
        expected = lowered.cost_analysis()["flops"]
        assert count(lowered.compile().as_text()).flops == expected > 0


COLLECTIVES = """\
  %p = f32[128,64]{1,0} parameter(0), metadata={op_name="state.params[\\'blocks_3\\'][\\'w1\\']"}
  %c = bf16[128,64]{1,0} convert(%p)
  %g = (bf16[128,64]{1,0}, bf16[1024,64]{1,0}) all-gather-start(%c), dimensions={0}, \
replica_groups=[1,8]<=[8]
  %d = bf16[1024,64]{1,0} all-gather-done(%g)
  %s = f32[1024,64]{1,0} convert(%d), \
metadata={op_name="jit(step)/transpose(jvp(DiT))/blocks_3/mlp/mul"}
  %r = f32[128,64]{1,0} reduce-scatter(%s), dimensions={0}, replica_groups={{0,2},{1,3}}
  ROOT %t = f32[128,64]{1,0} all-to-all(%r), dimensions={0}, replica_groups=[2,4]<=[4,2]T(1,0), \
metadata={op_name="jit(step)/jvp(DiT)/DiT.predict/blocks_1/mlp/all_to_all"}"""


def test_collectives():
    gather, scatter, swap = count(module(COLLECTIVES)).collectives
    assert (gather.kind, gather.num_bytes) == ("all-gather", 7 * 128 * 64 * 2)
    assert gather.carries == ("params/blocks_3/w1",) and gather.devices == tuple(range(8))
    assert (scatter.kind, scatter.num_bytes) == ("reduce-scatter", 1024 * 64 * 4 / 2)
    assert scatter.devices == (0, 2)
    assert (swap.kind, swap.num_bytes) == ("all-to-all", 128 * 64 * 4 * 3 / 4)
    assert swap.devices == (0, 2, 4, 6)
    by_axes = COLLECTIVES.replace("[1,8]<=[8]", "mesh['a'=2,'b'=3,'c'=4] {'a','c'}")
    assert count(module(by_axes)).collectives[0].devices == (0, 1, 2, 3, 12, 13, 14, 15)


def test_all_reduces_receive_twice():
    """Summing the parts takes as much as handing out the sums."""
    text = """\
  %a = f32[128,64]{1,0} parameter(0)
  %r = f32[128,64]{1,0} all-reduce(%a), replica_groups={{0,1,2,3}}, to_apply=%add
  ROOT %p = f32[128,64]{1,0} collective-permute(%r), source_target_pairs={{0,1},{1,0}}"""
    reduce, permute = count(module(text)).collectives
    assert reduce.num_bytes == 2 * 128 * 64 * 4 * 3 / 4
    assert permute.num_bytes == 128 * 64 * 4 and permute.devices == (0, 1)


@pytest.mark.parametrize(
    "spelling, devices",
    [
        ("replica_groups={}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("replica_groups={{3,5},{1,2}}", (3, 5)),
        ("replica_groups={{0},{1}}", (0,)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=[8,1]<=[8]", (0,)),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data'}", (0, 4)),
        ("replica_groups=mesh['data'=2,'fsdp'=4] {'data','fsdp'}", (0, 1, 2, 3, 4, 5, 6, 7)),
        ("source_target_pairs={{2,6},{6,2}}", (2, 6)),
    ],
)
def test_every_spelling_of_groups(spelling, devices):
    text = f"""\
  %a = f32[128,64]{{1,0}} parameter(0)
  ROOT %r = f32[128,64]{{1,0}} all-reduce(%a), channel_id=1, {spelling}, to_apply=%add"""
    head = "HloModule jit_step, is_scheduled=true, num_partitions=8"
    text = module(text).replace(module(text).splitlines()[0], head, 1)
    assert count(text).collectives[0].devices == devices


@pytest.mark.parametrize(
    "spelling",
    [
        "channel_id=1",
        "replica_groups=[2,4]<=[8]X(1)",
        "replica_groups=[2,2,2]<=[8]",
        "replica_groups=mesh['data'=2,'fsdp'=4] {'fsdp':(1)2}",
        "replica_groups=mesh['data'=2] {'fsdp'}",
        "replica_groups=@somewhere",
    ],
)
def test_groups_in_another_spelling_are_no_guess(spelling):
    text = f"""\
  %a = f32[128,64]{{1,0}} parameter(0)
  ROOT %r = f32[128,64]{{1,0}} all-reduce(%a), {spelling}, to_apply=%add"""
    with pytest.raises(ValueError, match="groups of devices in a known form at r, found"):
        count(module(text))


SCHEDULE = """\
  %a = f32[128,64]{1,0} parameter(0)
  %g = (f32[128,64]{1,0}, f32[256,64]{1,0}) all-gather-start(%a), replica_groups={{0,1}}, \
dimensions={0}
  %k = f32[128,64]{1,0} add(%a, %a)
  %s = ((f32[128,64]{1,0}), f32[64,64]{1,0}, u32[]) async-start(%k), calls=%scatter
  %l = f32[128,64]{1,0} multiply(%k, %a)
  %u = ((f32[128,64]{1,0}), f32[64,64]{1,0}, u32[]) async-update(%s)
  %d = f32[256,64]{1,0} all-gather-done(%g)
  %m = f32[256,64]{1,0} negate(%d)
  %e = f32[64,64]{1,0} async-done(%u)
  ROOT %w = f32[64,64]{1,0} all-reduce(%e), replica_groups={{0,1}}, to_apply=%add"""
SCATTER = """\
%scatter (p: f32[128,64]) -> f32[64,64] {
  %p = f32[128,64]{1,0} parameter(0)
  ROOT %r = f32[64,64]{1,0} reduce-scatter(%p), replica_groups={{0,1}}, dimensions={0}
}
"""


def test_kernels_between_start_and_done():
    """A collective that is awaited at once starts and ends before the same kernel."""
    counts = count(module(SCHEDULE, SCATTER))
    assert [kernel.name for kernel in counts.kernels] == ["k", "l", "m"]
    assert [(c.kind, c.started, c.finished) for c in counts.collectives] == [
        ("all-gather", 0, 2),
        ("reduce-scatter", 1, 3),
        ("all-reduce", 3, 3),
    ]


def test_collectives_in_a_loop_run_as_often_as_it():
    loop = """\
  %a = f32[128,64]{1,0} parameter(0)
  ROOT %w = f32[128,64]{1,0} while(%a), condition=%test, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}"""
    body = """\
%body (p: f32[128,64]) -> f32[128,64] {
  %p = f32[128,64]{1,0} parameter(0)
  ROOT %r = f32[128,64]{1,0} all-reduce(%p), replica_groups={{0,1}}, to_apply=%add
}
%test (p: f32[128,64]) -> pred[] {
  ROOT %p = f32[128,64]{1,0} parameter(0)
}
"""
    (reduce,) = count(module(loop, body)).collectives
    assert reduce.times == 5


def test_matmuls_inside_of_fusions_count():
    call = """\
  %a = f32[8,16]{1,0} parameter(0)
  %b = f32[16,4]{1,0} parameter(1)
  ROOT %f = f32[8,4]{1,0} fusion(%a, %b), kind=kOutput, calls=%outer"""
    inside = """\
%inner (x: f32[8,16], y: f32[16,4]) -> f32[8,4] {
  %x = f32[8,16]{1,0} parameter(0)
  %y = f32[16,4]{1,0} parameter(1)
  ROOT %d = f32[8,4]{1,0} dot(%x, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
%outer (x: f32[8,16], y: f32[16,4]) -> f32[8,4] {
  %x = f32[8,16]{1,0} parameter(0)
  %y = f32[16,4]{1,0} parameter(1)
  ROOT %g = f32[8,4]{1,0} fusion(%x, %y), kind=kLoop, calls=%inner
}
"""
    counts = count(module(call, inside))
    assert counts.flops_by_type == {"f32": 2 * 8 * 16 * 4} and len(counts.kernels) == 1


def test_module_path():
    for op_name, expected in {
        "jit(train_step)/shard_map/while/body/closed_call/jvp(DiT)/DiT.predict/blocks_1/mlp/dot":
            "blocks_1/mlp",
        "jit(train_step)/transpose(jvp(DiT))/DiT.predict/blocks_2/attn/qkv/dot_general":
            "blocks_2/attn/qkv (backward)",
        "": "",
    }.items():  # fmt: skip
        assert module_path(op_name) == expected


SLICES = """\
%body (p0: f32[64,1024], p1: s32[]) -> f32[1,1024] {
  %p0 = f32[64,1024]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %z = s32[] constant(0)
  ROOT %d = f32[1,1024]{1,0} dynamic-slice(%p0, %p1, %z), dynamic_slice_sizes={1,1024}
}
"""


def test_memory_traffic():
    """A fusion that slices reads the slice; the plain one reads and writes all."""
    call = """\
  %a = f32[64,1024]{1,0} parameter(0)
  %i = s32[] parameter(1)
  ROOT %f = f32[1,1024]{1,0} fusion(%a, %i), kind=kLoop, calls=%body"""
    assert count(module(call, SLICES)).num_bytes == 2 * 4096 + 4
    # A TPU's own scratch memory does not count.
    kept = call.replace("ROOT %f = f32[1,1024]{1,0}", "ROOT %f = f32[1,1024]{1,0:T(8,128)S(1)}")
    assert count(module(kept, SLICES)).num_bytes < 2 * 4096 + 8
    fetched = """\
  %a = f32[64,1024]{1,0} parameter(0)
  ROOT %s = ((f32[64,1024]{1,0}), f32[8,1024]{1,0:S(1)}, s32[]) slice-start(%a), slice={[0:8]}"""
    assert count(module(fetched)).num_bytes == 8 * 1024 * 4
    add = "  %a = f32[64,1024]{1,0} parameter(0)\n  ROOT %s = f32[64,1024]{1,0} add(%a, %a)"
    assert count(module(add)).num_bytes == 3 * 64 * 1024 * 4


def test_buffers_updated_in_place():
    """Only the update is read and written, in a fusion or not."""
    update = """\
  %a = f32[64,1024]{1,0} parameter(0)
  %u = f32[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  %z = s32[] constant(0)
  ROOT %d = f32[64,1024]{1,0} dynamic-update-slice(%a, %u, %i, %z)"""
    assert count(module(update)).num_bytes == 2 * 4096
    call = """\
  %a = f32[64,1024]{1,0} parameter(0)
  %u = f32[1,1024]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %f = f32[64,1024]{1,0} fusion(%a, %u, %i), kind=kLoop, calls=%update"""
    body = f"%update (a: f32[64,1024]) -> f32[64,1024] {{\n{update}\n}}\n"
    assert count(module(call, body)).num_bytes == 2 * 4096 + 4


def test_scratch_space_is_no_traffic():
    assert count(module(CUBLAS)).num_bytes == 2 * (4096 * 1024 + 1024 * 512 + 4096 * 512)


def test_parse():
    text = module(COLLECTIVES)
    (entry,) = parse(text).computations.values()
    assert entry.root.name == "t" and len(entry.instructions) == 7
    assert np.prod(entry.instructions["d"].shapes[0].dims) == 1024 * 64
    with pytest.raises(ValueError, match="HLO module"):
        parse("nothing")
