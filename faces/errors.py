"""Mistakes a user can mend: one clear sentence on stderr and an exit status, never a traceback."""
import functools
import os
import sys


class InputError(Exception):
    """Bad input. The message is one sentence that names the file and says what to do."""


def command(main):
    """Decorate a script's main(): an InputError becomes `script: sentence` and status 2, Ctrl-C status 130.

    Anything else stays a traceback: it is our mistake, and the traceback is what we need to mend it.
    """
    @functools.wraps(main)
    def run(*args, **kwargs):
        script = os.path.basename(sys.argv[0])
        try:
            return main(*args, **kwargs)
        except InputError as error:
            sys.exit(_say(f"{script}: {error}", 2))
        except KeyboardInterrupt:
            sys.exit(_say(f"{script}: interrupted", 130))
        except BrokenPipeError:  # `lfw_eval.py | head` is not an error; keep the interpreter from saying so at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
    return run


def _say(sentence, status):
    print(sentence, file=sys.stderr)
    return status
