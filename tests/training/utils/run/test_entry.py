"""How an error or Ctrl-C ends a step."""

import pytest

from training.utils.run.entry import errors_told

pytestmark = pytest.mark.fast


def test_ctrl_c_is_one_sentence_and_the_shell_s_exit_code(capsys):
    with pytest.raises(SystemExit) as end, errors_told():
        raise KeyboardInterrupt
    assert end.value.code == 130
    assert capsys.readouterr().err == "Stopped by Ctrl-C; --resume continues from the newest checkpoint, if there is one.\n"
