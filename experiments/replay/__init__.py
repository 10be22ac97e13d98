"""Published runs replayed: do small runs help the search at the large scale?"""
