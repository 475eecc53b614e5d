import sys

from .paper import main

sys.exit(main())
