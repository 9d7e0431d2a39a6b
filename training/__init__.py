"""Training of segmentation models in PyTorch; installed as `cada_deploy.training`."""
