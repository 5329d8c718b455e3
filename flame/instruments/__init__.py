"""What the future loss learns, measured now and then in the middle of training. How to read it: docs/instruments.md."""
