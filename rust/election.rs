//! Ranked-choice voting: who falls first when the last in votes goes and its voters choose again.

use crate::error::{Error, Result};

/// The order in which all candidates fall: each time the one with the fewest votes, of equals the
/// largest.
///
/// `ballots` has rows of `width` candidates, best first; numbers from `n_candidates` on stand for
/// none. A voter votes for those of its first `n_votes` places, and for the next one left on its
/// ballot when one of them falls.
///
/// # Errors
/// Ballots that are not whole rows, or more than `u32` places of them.
pub fn falls(
    ballots: &[u16],
    width: usize,
    n_votes: usize,
    n_candidates: usize,
) -> Result<Vec<u32>> {
    let mut poll = Poll::new(ballots, width, n_votes, n_candidates)?;
    let mut left: Vec<u32> = (0..n_candidates as u32).rev().collect();
    let mut gone = Vec::with_capacity(n_candidates);
    // The first of the least is the largest, as those left stand in falling order.
    while let Some(at) = (0..left.len()).min_by_key(|&at| poll.votes[left[at] as usize]) {
        let lost = left.remove(at);
        poll.lose(lost as usize);
        gone.push(lost);
    }
    Ok(gone)
}

/// What becomes of one place of a ballot.
#[derive(Clone, Copy, PartialEq)]
enum Place {
    /// It stands for nobody, or for somebody who fell.
    Void,
    Waiting,
    Voting,
}

struct Poll<'a> {
    ballots: &'a [u16],
    width: usize,
    places: Vec<Place>,
    votes: Vec<u32>,
    /// Places of each candidate, those of candidate `c` from `first[c]` to `first[c + 1]`.
    held: Vec<u32>,
    first: Vec<usize>,
}

impl<'a> Poll<'a> {
    fn new(ballots: &'a [u16], width: usize, n_votes: usize, n_candidates: usize) -> Result<Self> {
        if width == 0
            || !ballots.len().is_multiple_of(width)
            || u32::try_from(ballots.len()).is_err()
        {
            return Err(Error::Value {
                what: "ballots",
                got: format!("{} places", ballots.len()),
                position: ballots.len(),
                allowed: "at most 2^32 places in whole rows",
            });
        }
        let mut poll = Self {
            ballots,
            width,
            places: vec![Place::Void; ballots.len()],
            votes: vec![0; n_candidates],
            held: vec![
                0;
                ballots
                    .iter()
                    .filter(|&&c| usize::from(c) < n_candidates)
                    .count()
            ],
            first: vec![0; n_candidates + 1],
        };
        poll.open(n_votes);
        poll.index();
        Ok(poll)
    }

    /// Gives every voter's first votes.
    fn open(&mut self, n_votes: usize) {
        for (at, &candidate) in self.ballots.iter().enumerate() {
            if let Some(votes) = self.votes.get_mut(usize::from(candidate)) {
                let voting = at % self.width < n_votes;
                self.places[at] = if voting {
                    Place::Voting
                } else {
                    Place::Waiting
                };
                *votes += u32::from(voting);
            }
        }
    }

    /// Notes where each candidate stands.
    fn index(&mut self) {
        let n = self.votes.len();
        for &candidate in self.ballots.iter().filter(|&&c| usize::from(c) < n) {
            self.first[usize::from(candidate) + 1] += 1;
        }
        for candidate in 0..n {
            self.first[candidate + 1] += self.first[candidate];
        }
        let mut next = self.first.clone();
        for (at, &candidate) in self.ballots.iter().enumerate() {
            if usize::from(candidate) < n {
                self.held[next[usize::from(candidate)]] = at as u32;
                next[usize::from(candidate)] += 1;
            }
        }
    }

    /// Takes a candidate off all ballots; those who voted for it vote for the next one left.
    fn lose(&mut self, lost: usize) {
        for held in self.first[lost]..self.first[lost + 1] {
            let at = self.held[held] as usize;
            let voted = self.places[at] == Place::Voting;
            self.places[at] = Place::Void;
            if voted {
                self.vote_again(at - at % self.width);
            }
        }
    }

    /// Lets the first that waits on the ballot that starts here have a vote.
    fn vote_again(&mut self, start: usize) {
        let own = start..start + self.width;
        if let Some(at) = own
            .into_iter()
            .find(|&at| self.places[at] == Place::Waiting)
        {
            self.places[at] = Place::Voting;
            self.votes[usize::from(self.ballots[at])] += 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn votes_pass_on_to_the_next_who_is_left() {
        // Votes 2, 1, 2, 0: 3 falls, then 1, whose voter goes to 2; then 0 with 2 votes against 3.
        let ballots = [0, 1, 2, 3, 0, 2, 1, 3, 1, 2, 0, 3, 2, 1, 0, 3, 2, 0, 1, 3];
        assert_eq!(falls(&ballots, 4, 1, 4).unwrap(), [3, 1, 0, 2]);
    }

    #[test]
    fn of_equals_the_largest_falls_and_nobody_is_no_candidate() {
        assert_eq!(falls(&[u16::MAX, u16::MAX], 2, 1, 3).unwrap(), [2, 1, 0]);
        assert_eq!(falls(&[], 4, 1, 2).unwrap(), [1, 0]);
    }

    #[test]
    fn ballots_come_in_whole_rows() {
        assert!(falls(&[0, 1, 2], 2, 1, 3).is_err());
        assert!(falls(&[], 0, 1, 3).is_err());
    }
}
