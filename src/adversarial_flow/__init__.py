"""Adversarial Flow Models (arXiv 2511.22475, arXiv 2604.11521) with accelerate and diffusers."""

from adversarial_flow.models import (
    AdversarialFlowClassifier,
    AdversarialFlowDiscriminator,
    AdversarialFlowTransformer2DModel,
    JiTDiscriminator,
    JiTTransformer2DModel,
)
from adversarial_flow.pipelines import AdversarialFlowPipeline
from adversarial_flow.utils.derivative import DirectionalDerivative


__version__ = "0.1.0.dev0"
__all__ = [
    "AdversarialFlowClassifier",
    "AdversarialFlowDiscriminator",
    "AdversarialFlowPipeline",
    "AdversarialFlowTransformer2DModel",
    "DirectionalDerivative",
    "JiTDiscriminator",
    "JiTTransformer2DModel",
]
