"""Models of images, video and sound, whose tensors have other names, and other rows, in different programs."""
