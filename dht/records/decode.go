package records

// Decode reads a record as kad-dht holds it and checks its signature and who may write it, but not whether the writer is a member.
func Decode(envelope []byte) (Record, error) {
	r, err := open(envelope)
	if err != nil {
		return Record{}, err
	}
	return *r, nil
}
