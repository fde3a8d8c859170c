"""What the person said: run files, cluster profiles and command lines, read strictly. No torch here."""

import os

# pydantic would look through every installed distribution for plugins: a tenth of the time `hpcft plan` may take.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
