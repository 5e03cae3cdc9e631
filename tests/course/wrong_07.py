"Typical wrong answers to the exercises of lesson 7."

from answers import Wrong

WRONG = {
    '7.1': Wrong('def cheat(images):\n    return (images + 0.1).clamp(0, 1)', 'make them differ'),
    '7.2': Wrong(
        'def looks_taken(looks, patience):\n    return min(len(looks), looks.index(max(looks)) + 1 + patience)',
        'decide by what has been seen',
    ),
    '7.3': Wrong(
        'def repaired(images, prompts):\n    return crispness(blur(images))  # single pixels no longer count',
        'still ruins the images',
    ),
}
