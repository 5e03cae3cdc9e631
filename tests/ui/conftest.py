"Fixtures of all tests of pages in a browser."

from browsing import browser, look  # noqa: F401 (fixtures)
