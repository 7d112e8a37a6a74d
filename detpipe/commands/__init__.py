"""What ``detpipe COMMAND`` and the scripts in ``tools/`` run; :mod:`detpipe.cli` finds them."""
