"""Shares of a step's time: of a made trace, of a made program, and of a real one."""

import jax
import jax.numpy as jnp
import pytest

from vit_jax.benchmarking.profile import _CONTAINER, NOTHING, OTHER, _kinds, _shared_out, profile

pytestmark = pytest.mark.core

PROGRAM = """HloModule jit_train_step

%inside (a: f32[2,3], b: f32[3,4]) -> f32[2,4] {
  %a = f32[2,3]{1,0} parameter(0)
  %b = f32[3,4]{1,0} parameter(1)
  %dot.1 = f32[2,4]{1,0} dot(%a, %b), metadata={op_name="jit(f)/M/MlpBlock_0/Dense_0/dot_general"}
  ROOT %tanh.1 = f32[2,4]{1,0} tanh(%dot.1), metadata={op_name="jit(f)/M/MlpBlock_0/tanh"}
}

ENTRY %main (a: f32[2,3], b: f32[3,4]) -> f32[2,4] {
  %a.1 = f32[2,3]{1,0} parameter(0)
  %fusion.1 = f32[2,4]{1,0} fusion(%a.1, %b.1), kind=kOutput, calls=%inside
  %add.1 = f32[2,4]{1,0} add(%fusion.1, %c), metadata={op_name="jit(f)/encoderblock_3/add"}
  %dot.2 = f32[2,4]{1,0} dot(%x, %y), metadata={op_name="jit(f)/transpose(jvp(M))/encoderblock_1/MultiHeadDotProductAttention_0/query/dot_general"}
  %gemm.1 = f32[2,4]{1,0} custom-call(%x, %y), custom_call_target="__cublas$gemm", metadata={op_name="jit(f)/encoderblock_1/MultiHeadDotProductAttention_0/dot_general"}
  %multiply.7 = f32[2,4]{1,0} multiply(%x, %y), metadata={op_name="jit(f)/optimizer/mul"}
  %while.2 = (f32[2,4]{1,0}) while(%t), condition=%c, body=%b, metadata={op_name="jit(f)/encoderblock/while"}
  ROOT %copy.4 = f32[2,4]{0,1} copy(%add.1)
}
"""  # noqa: E501


def test_what_an_instruction_is_part_of():
    kinds = _kinds(PROGRAM)
    assert kinds["fusion.1"] == ("MLP", True)  # by what is in it
    assert kinds["add.1"] == ("residuals", False)
    assert kinds["dot.2"] == ("attention: projections", True)
    assert kinds["gemm.1"] == ("attention", True)
    assert kinds["multiply.7"] == ("optimizer", False)
    assert kinds["copy.4"] == (OTHER, False)
    assert kinds["while.2"] == _CONTAINER


def test_time_is_shared_out():
    """a for 10; b from 4 to 8, so that each has half of that; nothing from 10 to 15; a again."""
    events = [(0, 10, "a"), (4, 8, "b"), (15, 16, "a")]
    assert _shared_out(events) == {"a": 9, "b": 2, None: 5}


def test_a_real_program():
    @jax.jit
    def work(x):
        with jax.named_scope("optimizer"):
            x = jnp.sort(x, axis=0) + 1
        with jax.named_scope("loss"):
            return x @ x

    x = jax.random.normal(jax.random.key(0), (700, 700))
    executable = work.lower(x).compile()
    found = {share.part: share for share in profile(executable, lambda: executable(x))}
    assert set(found) <= {"optimizer", "loss", OTHER, NOTHING}
    assert sum(share.total for share in found.values()) == pytest.approx(1)
    assert found["loss"].products > 0 == found["optimizer"].products
    assert found["optimizer"].total > 0


def test_a_loop_is_what_is_in_it():
    @jax.jit
    def work(x):
        def body(x, _):
            with jax.named_scope("loss"):
                return x @ x / 1000, None
        return jax.lax.scan(body, x, None, length=9)[0]

    x = jax.random.normal(jax.random.key(0), (300, 300))
    executable = work.lower(x).compile()
    found = {share.part: share for share in profile(executable, lambda: executable(x))}
    assert found["loss"].total > (found[OTHER].total if OTHER in found else 0)
