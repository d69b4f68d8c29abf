"""What a trained model is like where it ended: curvature, sharpness, loss slices, and the updates of one cohort."""
