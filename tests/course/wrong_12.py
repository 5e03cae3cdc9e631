"Lesson 12: wrong answers."

from answers import Wrong

WRONG = {
    '12.1': Wrong('def gains(G, w):\n    return G @ w', 'divide by its length'),
    '12.2': Wrong(
        'def project(g_i, g_j):\n    return g_i - (g_i @ g_j) / (g_j @ g_j) * g_j',
        'only where the product is negative',
    ),
    '12.3': Wrong(
        "def reading(cosines):\n    return 'conflict' if sum(cosines) < 0 else 'agree'",
        'on one side of 0',
    ),
    '12.4': Wrong("my_strategy = 'together'", 'is not the most'),
}
