"""Reading traced programs: every equation of a jaxpr, however deep."""

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr


def equations(function, *args):
    """All equations of `function` traced on `args`, those inside of jit, scan, remat included."""

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            yield equation
            for value in jax.tree.leaves(
                list(equation.params.values()),
                is_leaf=lambda x: isinstance(x, (Jaxpr, ClosedJaxpr)),
            ):
                if isinstance(value, (Jaxpr, ClosedJaxpr)):
                    yield from walk(getattr(value, "jaxpr", value))

    return list(walk(jax.make_jaxpr(function)(*args).jaxpr))


def named(equations, *primitives):
    """Those equations whose primitive has one of the names."""
    return [equation for equation in equations if equation.primitive.name in primitives]


def input_types(equations):
    """The dtypes of all inputs of the equations."""
    return {variable.aval.dtype.name for equation in equations for variable in equation.invars}
