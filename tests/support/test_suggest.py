from detpipe.support.suggest import did_you_mean


def test_near_names_best_first():
    assert did_you_mean("resnet_50", ["resnet18", "resnet50", "vgg"]) == "; did you mean 'resnet50' or 'resnet18'?"


def test_nothing_near():
    assert did_you_mean("abc", ["xyz"]) == ""
    assert did_you_mean("abc", iter(())) == ""


def test_capitals_alone_leave_no_doubt():
    assert did_you_mean("RoiAlign", ["RotatedRoIAlign", "RoIAlign"]) == "; did you mean 'RoIAlign'?"
