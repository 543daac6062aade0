"""Every test sees eight CPU devices; what a single device should do, a test asks of one of them."""

import jax

jax.config.update('jax_num_cpu_devices', 8)
