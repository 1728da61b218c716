"""What torch.onnx or ONNX Runtime would get wrong, and how it is written instead; one file for each trouble."""
