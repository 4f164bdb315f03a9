"""Model-stealing attacks as pure training loops."""
