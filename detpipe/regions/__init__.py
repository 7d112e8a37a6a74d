"""Other models on regions and on images: classifiers of images and of given boxes, weakly supervised localization."""
