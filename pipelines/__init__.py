from adversarial_flow.pipelines.pipeline_adversarial_flow import AdversarialFlowPipeline


__all__ = ["AdversarialFlowPipeline"]
