//! Records waiting to be sent, oldest first, where a newer record displaces those it covers.
//!
//! The order between records that overlap is never changed. The queue does not decide what enters.

use std::collections::BTreeMap;

use super::record::Record;

/// What a record costs in memory beside its payload, in bytes.
pub(super) const RECORD_COST: u64 = 64;

/// A queue of records.
#[derive(Debug, Default)]
pub(super) struct RecordQueue {
    items: BTreeMap<u64, Record>,
    /// `(offset, place in the queue)` to the end of the range, for records that change the disk.
    places: BTreeMap<(u64, u64), u64>,
    flush: Option<u64>,
    next_place: u64,
    bytes: u64,
}

impl RecordQueue {
    /// Payload and overhead of all records, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    pub(super) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Appends a record. Queued records that it covers whole are removed: what they wrote would be
    /// overwritten before anybody may read it. If `joins`, zeros become one record with those before them, in their place.
    pub(super) fn push(&mut self, record: Record, joins: bool) {
        if let Some((offset, end)) = record.range() {
            self.remove_covered(offset, end);
            if joins && self.extends_last(&record) {
                return;
            }
            self.places.insert((offset, self.next_place), end);
        } else if record == Record::Flush {
            // One is enough: what counts is the flush that the destination makes for a barrier.
            if let Some(older) = self.flush.replace(self.next_place) {
                self.remove(older);
            }
        }
        self.bytes += cost(&record);
        self.items.insert(self.next_place, record);
        self.next_place += 1;
    }

    /// The oldest record, if its place is before `limit`.
    pub(super) fn front_before(&self, limit: u64) -> Option<&Record> {
        let (place, record) = self.items.first_key_value()?;
        (*place < limit).then_some(record)
    }

    /// The place of the next record that comes.
    pub(super) fn next_place(&self) -> u64 {
        self.next_place
    }

    /// First byte and end of what waits, of each record.
    pub(super) fn ranges(&self) -> impl Iterator<Item = (u64, u64)> {
        self.places.iter().map(|((offset, _), end)| (*offset, *end))
    }

    /// Takes the oldest record.
    pub(super) fn pop(&mut self) -> Option<Record> {
        let (place, record) = self.items.pop_first()?;
        self.bytes -= cost(&record);
        if let Some((offset, _)) = record.range() {
            self.places.remove(&(offset, place));
        }
        self.flush = self.flush.filter(|flush| *flush != place);
        Some(record)
    }

    /// Zeros that continue the zeros queued last become one record with them.
    fn extends_last(&mut self, record: &Record) -> bool {
        let Record::Zero { offset, len } = record else { return false };
        match self.items.last_entry() {
            Some(mut last) => match last.get_mut() {
                Record::Zero { offset: start, len: so_far } if *start + *so_far == *offset => {
                    *so_far += len;
                    let (start, end) = (*start, *start + *so_far);
                    self.places.insert((start, *last.key()), end);
                    true
                }
                Record::Zero { .. }
                | Record::Write { .. }
                | Record::Same { .. }
                | Record::Flush
                | Record::Barrier(_) => false,
            },
            None => false,
        }
    }

    fn remove_covered(&mut self, offset: u64, end: u64) {
        let inside = self.places.range((offset, 0)..(end, 0));
        let covered: Vec<_> = inside.filter(|(_, other)| **other <= end).map(|(place, _)| *place).collect();
        for place in covered {
            self.places.remove(&place);
            self.remove(place.1);
        }
    }

    fn remove(&mut self, place: u64) {
        if let Some(record) = self.items.remove(&place) {
            self.bytes -= cost(&record);
        }
    }
}

/// What a record counts against a bound, in bytes.
pub(super) fn cost(record: &Record) -> u64 {
    RECORD_COST + record.payload_len()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn apply(disk: &mut [u8], record: &Record) {
        match record {
            Record::Write { offset, data } => disk[*offset as usize..][..data.len()].copy_from_slice(data),
            Record::Zero { offset, len } => disk[*offset as usize..][..*len as usize].fill(0),
            Record::Same { .. } | Record::Flush | Record::Barrier(_) => {}
        }
    }

    proptest! {
        #[test]
        fn displacing_covered_records_changes_nothing(
            writes in prop::collection::vec((0..60u64, 1..30u64, any::<u8>(), 0..4u8), 0..60),
        ) {
            let (mut queue, mut model, mut disk) = (RecordQueue::default(), [9; 100], [9; 100]);
            for (offset, len, byte, kind) in writes {
                let record = match kind {
                    0 => Record::Flush,
                    1 => Record::Zero { offset, len },
                    _ => Record::Write { offset, data: vec![byte; len as usize].into() },
                };
                apply(&mut model, &record);
                queue.push(record, true);
            }
            while let Some(record) = queue.pop() {
                apply(&mut disk, &record);
            }
            prop_assert_eq!(disk, model);
            prop_assert_eq!((queue.bytes(), queue.places.len()), (0, 0));
        }
    }

    #[test]
    fn a_block_that_is_written_again_and_again_is_queued_once() {
        let mut queue = RecordQueue::default();
        for byte in 0..100 {
            queue.push(Record::Write { offset: 4096, data: vec![byte; 512].into() }, true);
            queue.push(Record::Flush, true);
            queue.push(Record::Flush, true);
        }
        assert_eq!(queue.bytes(), 512 + 2 * RECORD_COST);
    }
}
