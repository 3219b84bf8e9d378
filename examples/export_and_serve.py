"""Export one client's model as bytes that need only JAX to run: no Flax, and not this package."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from examples.shared import classifier, digits, federate, train
from flexmoe_jax import simulation

clients, test = digits()
federation = federate(classifier(), clients)
simulated, state = train(federation, clients)

# The parameters of client 3 by path, with only the experts that it holds, and the model function.
mine = simulation.client_model(federation, state, 3)
(batch,) = export.symbolic_shape("batch")
shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in mine.params.items()}
images = jax.ShapeDtypeStruct((batch, 8, 8, 1), jnp.uint8)
exported = export.export(jax.jit(mine.apply))(shapes, images).serialize()
print(f"{len(exported)} bytes of program; experts {mine.experts['mixture']} of four")

# In another process, on another machine:
served = export.deserialize(bytearray(exported))
parameters = {path: np.asarray(leaf) for path, leaf in mine.params.items()}
for size in (1, 5):
    pictures = jnp.asarray(test.arrays["images"][0, :size], jnp.uint8)
    logits = served.call(parameters, pictures)
    assert np.allclose(logits, mine.apply(mine.params, pictures), atol=1e-5)
    print(f"{size} pictures: {np.asarray(logits).argmax(axis=-1).tolist()}")
