"""What can be looked at: boxes on images, curves, gates, glimpses, localization maps."""
