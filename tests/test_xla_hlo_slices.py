"""Counting what libtpu writes as a host's sends and receives: collectives between slices."""

import pytest

from microdit_jax.xla.hlo.count import count


def module(body: str) -> str:
    return f"HloModule m, num_partitions=4\n\nENTRY %main (a: f32[]) -> f32[] {{\n{body}\n}}\n"


# libtpu's text of one of two slices with four chips each, but for shapes and other attributes.
MEGASCALE = """\
  %%a = f32[128,8,128]{2,1,0:T(8,128)} parameter(0)
  %%t = token[] after-all()
  %%s = (f32[128,8,128]{2,1,0:T(8,128)}, u32[], token[]) send(%%a, %%t), channel_id=2, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="psum_0",%(about)s}
  %%r = (f32[128,8,128]{2,1,0:T(8,128)}, u32[], token[]) recv(%%t), channel_id=1, \
is_host_transfer=true, frontend_attributes={_xla_host_transfer_rendezvous="psum_0",%(about)s}
  %%m = f32[128,8,128]{2,1,0:T(8,128)} negate(%%a)
  %%d = token[] send-done(%%s), channel_id=2, is_host_transfer=true
  %%w = (f32[128,8,128]{2,1,0:T(8,128)}, token[]) recv-done(%%r), channel_id=1
  %%g = f32[128,8,128]{2,1,0:T(8,128)} get-tuple-element(%%w), index=0
  ROOT %%z = f32[128,8,128]{2,1,0:T(8,128)} add(%%g, %%m)"""
PART = 128 * 8 * 128 * 4


@pytest.mark.parametrize(
    "kind, target, devices, received",
    [
        ("ALL_REDUCE", '"{1,2}x{0:3}"', (0, 4), PART),
        ("ALL_REDUCE", '"{1,2,3,4}x{0:3}"', (0, 4, 8, 12), 1.5 * PART),
        ("ALL_GATHER", '"{1,2,3,4}x{0:3}"', (0, 4, 8, 12), 3 * PART),
        ("REDUCE_SCATTER", '"{1,2}x{0:3}"', (0, 4), PART / 2),
        ("ALL_TO_ALL", "{{100001,200001},{100000,200000}}", (1, 5), PART / 2),
        ("ONE_TO_ONE", "{{100000->200000},{200000->100000}}", (0, 4), PART),
    ],
)
def test_collectives_between_slices_of_tpus(kind, target, devices, received):
    about = f'_xla_megascale_target={target},_xla_megascale_transfer_type="{kind}"'
    text = module(MEGASCALE % {"about": about})
    counts = count(text)
    (found,) = counts.collectives
    assert (found.devices, found.num_bytes) == (devices, received)
    assert found.kind == kind.lower().replace("_", "-").replace("one-to-one", "collective-permute")
    assert (found.started, found.finished) == (0, 1) and len(counts.kernels) == 2


def test_unknown_transfers_between_slices():
    about = '_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="GOSSIP"'
    with pytest.raises(ValueError, match="expected a known kind of transfer .* found GOSSIP"):
        count(module(MEGASCALE % {"about": about}))
    about = '_xla_megascale_target="all",_xla_megascale_transfer_type="ALL_REDUCE"'
    with pytest.raises(ValueError, match="expected slices in a known form at s, found"):
        count(module(MEGASCALE % {"about": about}))
