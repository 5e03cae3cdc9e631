"Lesson 1: ten-minute win."

from answers import Wrong

WRONG = {
    '1.1': Wrong(
        '''
def blueness(images, prompts):
    return images[:, 2].mean((1, 2))
''',
        'it rewards brightness',
    ),
    '1.2': Wrong(
        '''
def interval(change):
    return change.mean() - 1.96 * change.std(), change.mean() + 1.96 * change.std()
''',
        'divide by the root of n',
    ),
    '1.3': Wrong('bluer = Policy(load_demo())', 'it was not trained'),
}
