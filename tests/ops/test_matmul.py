"""The matrix product of a map's channels, against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparx_jax.ops import matmul

X = np.random.default_rng(0).standard_normal((2, 5, 3, 1024), np.float32)
KERNEL = np.random.default_rng(1).standard_normal((1024, 1024), np.float32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("pixels", [(2, 5, 3), (30,)])
@pytest.mark.parametrize("dim, out_dim", [(6, 4), (6, 1024), (512, 6), (1024, 1024)])
def test_values_and_gradients_are_those_of_jax(pixels, dtype, dim, out_dim):
    """Also where CPU rows are wider than asked for: of whole half pages."""
    x = jnp.asarray(X[..., :dim].reshape(*pixels, dim), dtype)
    kernel = jnp.asarray(KERNEL[:dim, :out_dim], dtype)
    y, vjp = jax.vjp(matmul, x, kernel)
    # In float32, as JAX 0.12 rounds sums of bfloat16 on the way.
    wide = (t.astype(jnp.float32) for t in (x, kernel))
    expected, reference = jax.vjp(jnp.matmul, *wide)
    wanted = expected, *reference(y.astype(jnp.float32))
    for got, want in zip((y, *vjp(y)), wanted, strict=True):
        assert got.dtype == dtype and got.shape == want.shape
        limit = 2e-6 if dtype == "float32" else 4e-3
        error = np.abs(np.asarray(got, np.float32) - want).max()
        assert error <= limit * np.abs(want).max()


def test_gradients_of_two_dtypes_and_of_no_pixels():
    """The rows of the kernel are not the rows of the map then."""
    kernel = jnp.asarray(KERNEL[:512, :512], "bfloat16")
    for x in (jnp.asarray(X[..., :512]), jnp.zeros((0, 3, 512))):
        grads = [
            jax.grad(lambda *args, f=f: f(*args).sum(), (0, 1))(x, kernel)
            for f in (matmul, jnp.matmul)
        ]
        for got, want in zip(*grads, strict=True):
            assert got.dtype == want.dtype and got.shape == want.shape
            np.testing.assert_allclose(
                *(np.asarray(t, np.float32) for t in (got, want)), rtol=0.02, atol=1e-3
            )


def test_gradients_keep_the_precision_of_the_product():
    """JAX's setting is gone when it asks for the gradient."""

    def loss(x, kernel):
        with jax.default_matmul_precision("float32"):
            return matmul(x, kernel).sum()

    text = str(jax.make_jaxpr(jax.grad(loss, (0, 1)))(X, KERNEL))
    # The product and its two gradients, for some platforms apart.
    assert text.count("dot_general") == text.count("precision=(Precision.HIGHEST") >= 3


def test_no_map_is_transposed_on_cpu():
    x, kernel = jnp.ones((2, 8, 8, 96)), jnp.ones((96, 288))

    def copies(product):
        def gradient(x, kernel, grad):
            # The map comes from elsewhere: a parameter would be copied in any case.
            return jax.vjp(product, jnp.sin(x), kernel)[1](jnp.sin(grad))[1]

        text = jax.jit(gradient).lower(x, kernel, product(x, kernel)).compile()
        return text.as_text().count("f32[288,128]")

    assert copies(matmul) == 0 < copies(jnp.matmul), "the case would not show it"
