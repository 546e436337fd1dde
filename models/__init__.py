from adversarial_flow.models.classifier_adversarial_flow import AdversarialFlowClassifier
from adversarial_flow.models.discriminator_adversarial_flow import AdversarialFlowDiscriminator
from adversarial_flow.models.discriminator_jit import JiTDiscriminator
from adversarial_flow.models.transformer_adversarial_flow import AdversarialFlowTransformer2DModel
from adversarial_flow.models.transformer_jit import JiTTransformer2DModel


__all__ = [
    "AdversarialFlowClassifier",
    "AdversarialFlowDiscriminator",
    "AdversarialFlowTransformer2DModel",
    "JiTDiscriminator",
    "JiTTransformer2DModel",
]
