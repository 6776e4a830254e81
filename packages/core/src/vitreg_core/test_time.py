"""Test-time registers: find the neurons that write outliers, and move them off the patches without training.

    neurons = find_register_neurons(model, images)  # 100 to 1,000 images like those to come
    mended = with_test_time_registers(model, neurons)

Jiang et al. 2025, arXiv 2506.08010.
"""

from vitreg_core.edited import with_attention_bias, with_test_time_registers
from vitreg_core.neuron_search import find_register_neurons
from vitreg_core.register_neurons import Neuron, RegisterNeurons, Step

__all__ = [
    "Neuron",
    "RegisterNeurons",
    "Step",
    "find_register_neurons",
    "with_attention_bias",
    "with_test_time_registers",
]
